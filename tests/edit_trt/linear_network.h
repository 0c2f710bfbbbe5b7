// What the kernel in tests/cuda_double/linear.cu takes.
#pragma once

#include <stdint.h>

struct linear_network {
    const float *x, *sigma;
    float *denoised;
    float slope, offset;
    uint32_t batch, elements;
};
