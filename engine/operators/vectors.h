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
