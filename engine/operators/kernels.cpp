// Compiled for each vector unit: -DKERNELS=kernels_v3 -march=x86-64-v3 (AVX2), v4 (AVX-512), bf16 and fp16 (with
// AVX512-BF16 and AVX512-FP16).
#include "kernels.h"

#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Inside the namespace: two builds must share no function, or the linker keeps the one of the wrong processor.
namespace {
#include "vectors.h"

#include "products.h"

#include "convolution.h"
#include "group_norm.h"

#include "attention.h"
}  // namespace

extern const kernels KERNELS = {
    HALVES, lay_out, pack_weights, pack, compute, normalize, lay_out_attention, pack_head, attend,
};
