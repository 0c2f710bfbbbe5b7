// One SDEdit step in plain C++: the noise philox-bm24-v1 and the update of an element.
//
// The same lines run on GPUs (sdedit.cu) and on any host whose compiler has IEEE float32; all of them, NumPy
// (noise.py, loop.py) included, give the same bits. On a host, forbid contraction: g++ or clang++ -ffp-contract=off,
// cl /fp:precise. Interface version 1; a change of meaning or layout raises it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define SDEDIT_INLINE __host__ __device__ __forceinline__
#else
#define SDEDIT_INLINE inline
#endif

#define SDEDIT_INTERFACE 1
#define SDEDIT_WRONG_INTERFACE 0xFFFFFFFFu  // as a fault: host and kernels are of different versions

// What every kernel takes, by value. Lengths in brackets, C order; pointers to device memory.
struct sdedit_edit {
    uint32_t interface;     // SDEDIT_INTERFACE
    uint32_t batch;         // B, images
    uint32_t elements;      // E = channels * height * width of an image
    uint32_t plane;         // P = height * width
    uint32_t steps;         // N
    uint32_t tables;        // 1, or B where each image has its own
    float *x;               // [B, E] the state, and the network's input
    float *sigma;           // [B] its noise level, the network's other input
    const float *denoised;  // [B, E] the network's output D(x; sigma)
    float *previous;        // [B, E] D of the step before; null where the table's d are all 0
    const float *guide;     // [B, E] in [-1, 1]
    const float *mask;      // [B, P] in [0, 1], 1 = repaint; null for none
    const float *table;     // [tables, N, 6] columns as in sdedit_row
    const uint64_t *seeds;  // [B]
    uint32_t *state;        // [4] as in sdedit_state
    uint8_t *pixels;        // [B, P, E / P] the result as an image; null where none is wanted
};

// A row of the step table: x' = a x + b D + d (D - D_previous) + c z.
struct sdedit_row {
    float sigma, a, b, c, d, sigma_next;
};

// All 0 before the first sdedit_start; the kernels keep it.
struct sdedit_state {
    uint32_t step;    // 0: the guide is not noised yet; 1 ... N: the row to run next; N + 1: the pass is done
    uint32_t repeat;  // the pass, from 0; a later one starts from the last one's result
    uint32_t blocks;  // thread blocks that have finished; 0 between kernels
    uint32_t fault;   // repeat * N + step of the first D that was not finite; 0 for none
};

namespace sdedit {

// One rounded operation each: the intrinsics keep nvcc from fusing a product into a sum.
#ifdef __CUDA_ARCH__
SDEDIT_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
SDEDIT_INLINE float sub(float a, float b) { return __fsub_rn(a, b); }
SDEDIT_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
SDEDIT_INLINE float root(float a) { return __fsqrt_rn(a); }
#else
SDEDIT_INLINE float add(float a, float b) { return a + b; }
SDEDIT_INLINE float sub(float a, float b) { return a - b; }
SDEDIT_INLINE float mul(float a, float b) { return a * b; }
SDEDIT_INLINE float root(float a) { return sqrtf(a); }
#endif

struct words {
    uint32_t w[4];
};

struct normals {
    float z[4];
};

enum stream : uint32_t { STREAM_STATE = 0, STREAM_MASK = 1 };

// Philox4x32-10 (Salmon et al. 2011).
SDEDIT_INLINE words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p2 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p2 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p2;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// sqrt(-2 ln(k 2^-24)) for k in [1, 2^24]. The logarithm is carried times -2, which scales every step exactly.
SDEDIT_INLINE float radius(uint32_t k) {
    const int32_t half_root = 0x3F3504F3;  // the float32 nearest sqrt(1/2), as bits
    float x = (float)k;                    // exact
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits -= half_root;
    const float exponent = (float)((bits >> 23) - 24);
    bits = (bits & 0x7FFFFF) + half_root;
    memcpy(&x, &bits, sizeof x);  // the mantissa, from sqrt(1/2) to sqrt(2)
    x = sub(x, 1.0f);
    const float z = mul(x, x);
    float y = mul(x, -2 * -0.076344974f);
    y = mul(add(y, -2 * 0.12761582f), x);
    y = mul(add(y, -2 * -0.13160184f), x);
    y = mul(add(y, -2 * 0.14201757f), x);
    y = mul(add(y, -2 * -0.16623357f), x);
    y = mul(add(y, -2 * 0.20001227f), x);
    y = mul(add(y, -2 * -0.2500082f), x);
    y = mul(add(y, -2 * 0.33333331f), x);
    y = mul(y, z);
    y = add(y, mul(exponent, -2 * -2.12194440e-4f));
    y = add(y, z);
    x = sub(y, add(x, x));
    return root(add(x, mul(exponent, -2 * 0.693359375f)));
}

// cos and sin of 2 pi j 2^-24 for j in [0, 2^24).
SDEDIT_INLINE void turn(uint32_t j, float &cosine, float &sine) {
    const int32_t q = (int32_t)(j + (1u << 21)) >> 22;  // quarter turns
    const float i = (float)((int32_t)j - (q << 22));    // exact
    const float angle = add(mul(i, 6.0f / 16777216.0f), mul(i, 1.687916e-08f));
    const float t = mul(angle, angle);
    float s = mul(t, -0.00019515282f);
    s = mul(add(s, 0.00833216f), t);
    s = mul(add(s, -0.16666655f), t);
    s = add(mul(s, angle), angle);
    float c = mul(t, 2.4433157e-05f);
    c = mul(add(c, -0.0013887316f), t);
    c = mul(add(c, 0.041666646f), t);
    c = mul(add(c, -0.5f), t);
    c = add(c, 1.0f);
    const float across = q & 1 ? s : c, along = q & 1 ? c : s;
    cosine = (q + 1) & 2 ? -across : across;
    sine = q & 2 ? -along : along;
}

// The normals of elements 4 block ... 4 block + 3 of an image.
SDEDIT_INLINE normals draw(uint64_t seed, uint32_t block, uint32_t step, uint32_t repeat, stream which) {
    const words random = philox4x32(block, step, repeat, which, seed);
    normals out;
    for (int pair = 0; pair < 4; pair += 2) {
        float cosine, sine;
        const float r = radius((random.w[pair] >> 8) + 1);
        turn(random.w[pair + 1] >> 8, cosine, sine);
        out.z[pair] = mul(cosine, r);
        out.z[pair + 1] = mul(sine, r);
    }
    return out;
}

// The step of one element, z its noise.
SDEDIT_INLINE float update(const sdedit_row &row, float x, float denoised, float previous, float z) {
    float sum = mul(denoised, row.b);
    if (row.d != 0) sum = add(sum, mul(sub(denoised, previous), row.d));
    x = add(mul(x, row.a), sum);
    return row.c != 0 ? add(x, mul(z, row.c)) : x;
}

// guide + mask (edited - guide), exact at both ends.
SDEDIT_INLINE float blend(float guide, float edited, float mask) {
    return add(mul(edited, mask), mul(sub(1.0f, mask), guide));
}

// After a step: kept parts get the guide at the level just reached, z its noise.
SDEDIT_INLINE float composite(const sdedit_row &row, float x, float guide, float mask, float z) {
    const float amount = root(sub(1.0f, mul(mask, mask)));
    return add(blend(guide, x, mask), mul(mul(z, amount), row.sigma_next));
}

// [-1, 1] -> 0 ... 255, clipped.
SDEDIT_INLINE uint8_t pixel(float x) {
    const float level = mul(add(x, 1.0f), 127.5f);
    return (uint8_t)rintf(level < 0 ? 0 : level > 255 ? 255 : level);
}

}  // namespace sdedit
