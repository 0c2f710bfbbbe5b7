// Products of packed matrices: u, whose rows have ROWS numbers, transposed, times v, whose rows are vectors of columns.

constexpr int ROWS = LANES == 16 ? 12 : 6;  // with two vectors of columns, the sums stay in registers
constexpr int AHEAD = 48;                   // rows of u that are fetched before they are needed

// out (ROWS, N vectors) = u (depth, ROWS), transposed, times v (depth, N vectors). add(sum, u, v) is sum + u v.
template <int N, class Add>
inline void multiply_by(const Add &add, const float *u, const float *v, int depth, float *out) {
    vec sums[ROWS][N];
    for (int r = 0; r < ROWS; ++r) {
        for (int n = 0; n < N; ++n) sums[r][n] = vec{};
    }
    for (int k = 0; k < depth; ++k, u += ROWS, v += N * LANES) {
        vec x[N];
        __builtin_prefetch(u + AHEAD * ROWS);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) x[n] = load(v + n * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sums[r][n] = add(sums[r][n], u + r, x[n]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(out + (r * N + n) * LANES, sums[r][n]);
    }
}

template <int N>
inline void multiply(const float *u, const float *v, int depth, float *out) {
    const auto add = [](vec sum, const float *one, vec x) { return sum + *one * x; };
    multiply_by<N>(add, u, v, depth, out);
}

// In half precision, where the processor multiplies in it, twice as many numbers at once: rows 2k and 2k + 1 are one
// row of pairs of halves, each as large as a float.
#if defined(__AVX512FP16__)
// A sum of many halves would lose what they keep. So RUN pairs are summed, then RUNS such sums, then the two of a pair,
// and then it goes on in float.
constexpr half_format HALVES = FP16;
constexpr int RUN = 16, RUNS = 4;

typedef _Float16 half_vec __attribute__((vector_size(4 * LANES)));  // LANES pairs

typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

inline ivec as_halves(vec v) { return (ivec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtxps_ph((__m512)v)); }

// The numbers of the lower lanes (0) or of the upper ones (1), two of each.
template <int PART>
inline vec as_floats(half_vec v) {
    return (vec)_mm512_cvtxph_ps((__m256h)_mm512_extracti64x4_epi64((__m512i)v, PART));
}

// (first, second) in every lane
inline vec in_pairs(vec first, vec second) { return (vec)(as_halves(first) | as_halves(second) << 16); }

// The sum of each pair of a and of b, as floats that alternate: of the lower lanes, and of the upper ones.
inline void sum_pairs(half_vec a, half_vec b, vec out[2]) {
    a += (half_vec)((bits)a >> 16 | (bits)a << 16);
    b += (half_vec)((bits)b >> 16 | (bits)b << 16);
    const half_vec both = (half_vec)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)a, (__m512i)b);
    out[0] = as_floats<0>(both), out[1] = as_floats<1>(both);
}

// out (ROWS, N vectors) = u (pairs, ROWS), transposed, times v (pairs, N vectors).
template <int N>
inline void multiply_halves(const float *u, const float *v, int pairs, float *out) {
    ivec even, odd;
    for (int i = 0; i < LANES; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    half_vec kept[ROWS * N];
    vec totals[ROWS * N / 2][2];  // of two sums, interleaved
    for (int from = 0, to; from < pairs; from = to) {
        to = pairs - from < RUN ? pairs : from + RUN;
        half_vec sums[ROWS * N];
        for (int n = 0; n < ROWS * N; ++n) sums[n] = half_vec{};
#pragma GCC unroll 4
        for (int k = from; k < to; ++k, u += ROWS, v += N * LANES) {
            half_vec x[N];
            __builtin_prefetch(u + AHEAD * ROWS);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) x[n] = (half_vec)load(v + n * LANES);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                memcpy(&pair, u + r, sizeof pair);
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) sums[r * N + n] += (half_vec)(pair - ivec{}) * x[n];
            }
        }
        if (from % (RUN * RUNS) > 0) {
#pragma GCC unroll 24
            for (int n = 0; n < ROWS * N; ++n) sums[n] += kept[n];
        }
        if (to < pairs && to % (RUN * RUNS) > 0) {
#pragma GCC unroll 24
            for (int n = 0; n < ROWS * N; ++n) kept[n] = sums[n];
            continue;
        }
#pragma GCC unroll 12
        for (int n = 0; n < ROWS * N; n += 2) {
            vec two[2];
            sum_pairs(sums[n], sums[n + 1], two);
            for (int k = 0; from >= RUN * RUNS && k < 2; ++k) two[k] += totals[n / 2][k];
            if (to < pairs) {
                for (int k = 0; k < 2; ++k) totals[n / 2][k] = two[k];
            } else {
                store(out + n * LANES, __builtin_shuffle(two[0], two[1], even));
                store(out + (n + 1) * LANES, __builtin_shuffle(two[0], two[1], odd));
            }
        }
    }
}
#elif defined(__AVX512BF16__)
// bfloat16, whose products are summed in float.
constexpr half_format HALVES = BF16;

// (first, second) in every lane
inline vec in_pairs(vec first, vec second) {
    typedef uint16_t words __attribute__((vector_size(4 * LANES)));
    words turns;
    for (int i = 0; i < 2 * LANES; ++i) turns[i] = i / 2 + i % 2 * LANES;
    return (vec)__builtin_shuffle((words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first), turns);
}

template <int N>
inline void multiply_halves(const float *u, const float *v, int pairs, float *out) {
    const auto add = [](vec sum, const float *pair, vec x) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all(*pair), (__m512bh)x);
    };
    multiply_by<N>(add, u, v, pairs, out);
}
#else
constexpr half_format HALVES = NO_HALVES;  // and none of this is called

inline vec in_pairs(vec first, vec) { return first; }

template <int N>
inline void multiply_halves(const float *, const float *, int, float *) {}
#endif
