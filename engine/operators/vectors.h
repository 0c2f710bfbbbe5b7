// Vectors of floats, as wide as the processor that this is compiled for has them.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

inline vec load(const float *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

inline vec all(float x) { return x - vec{}; }

#if defined(__AVX512F__)
inline vec reciprocal(vec x) {  // Newton's step from 14 bits
    const vec near = (vec)_mm512_rcp14_ps((__m512)x);
    return near * (2.0f - x * near);
}
#else
inline vec reciprocal(vec x) { return 1.0f / x; }
#endif

// e^x to 2e-7 near 0, to 2e-6 at -87 and at 87, beyond which it stays what it is there: 2^(n + r), n whole.
inline vec exponential(vec x) {
    constexpr float LOG2_E = 1.44269504f, ROUND = 12582912.0f;
    x = all(-87.0f) > x ? all(-87.0f) : x;
    x = all(87.0f) < x ? all(87.0f) : x;
    const vec shifted = x * LOG2_E + ROUND, r = x * LOG2_E - (shifted - ROUND);
    vec p = all(1.535336144e-04f);
    p = p * r + 1.339887457e-03f;
    p = p * r + 9.618437361e-03f;
    p = p * r + 5.550332471e-02f;
    p = p * r + 2.402264791e-01f;
    p = p * r + 6.931472029e-01f;
    p = p * r + 1.0f;
    return p * (vec)(((ivec)shifted << 23) + (127 << 23));
}
