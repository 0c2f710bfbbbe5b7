// A network in closed form, for tests: D = slope x + offset / (1 + sigma), each image with its own sigma.
#include <stdint.h>

struct linear_network {
    const float *x, *sigma;
    float *denoised;
    float slope, offset;
    uint32_t batch, elements;
};

extern "C" __global__ void linear(linear_network network) {
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= network.batch * network.elements) return;
    const float level = network.offset / (1.0f + network.sigma[at / network.elements]);
    network.denoised[at] = network.slope * network.x[at] + level;
}
