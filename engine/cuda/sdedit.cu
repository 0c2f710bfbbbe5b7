// The kernels of the device loop. A host launches, on one stream:
//
//     state = {0, 0, 0, 0}
//     for every pass (the paper's K):
//         sdedit_start                          x = guide + sigma z, the network's input
//         N times: the network, sdedit_step     the last leaves the clean image in x
//     sdedit_pixels                             optional: x as an image
//
// sdedit_start and sdedit_step: blocks of 256 threads, ceil(E / 1024) x B blocks. sdedit_pixels: ceil(P / 256) x B.
// Which step it is lies in device memory, so that one captured graph of the network and sdedit_step serves them all.
#include "sdedit.cuh"

namespace {

using sdedit::normals;

struct quad {
    float v[4];
};

// Four consecutive elements: in one 128-bit access where they are aligned, else one by one up to `count`.
__device__ __forceinline__ quad load(const float *from, uint32_t count, bool aligned) {
    quad q;
    if (aligned) {
        const float4 wide = *reinterpret_cast<const float4 *>(from);
        q.v[0] = wide.x, q.v[1] = wide.y, q.v[2] = wide.z, q.v[3] = wide.w;
    } else {
        for (uint32_t k = 0; k < 4; ++k) q.v[k] = k < count ? from[k] : 0;
    }
    return q;
}

__device__ __forceinline__ void store(float *to, const quad &q, uint32_t count, bool aligned) {
    if (aligned) {
        *reinterpret_cast<float4 *>(to) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
    } else {
        for (uint32_t k = 0; k < 4; ++k)
            if (k < count) to[k] = q.v[k];
    }
}

// Mask values of elements `first` ... `first` + 3: the mask is one plane for all channels.
__device__ __forceinline__ quad load_mask(const float *mask, uint32_t first, uint32_t count, uint32_t plane) {
    const uint32_t at = first % plane;
    if (plane % 4 == 0) return load(mask + at, 4, true);
    quad q;
    for (uint32_t k = 0; k < 4; ++k) q.v[k] = k < count ? mask[(at + k) % plane] : 0;
    return q;
}

// The last block to finish moves the edit on. No block can still be reading the old state by then.
__device__ __forceinline__ void finish(sdedit_state *state, uint32_t step, uint32_t repeat) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&state->blocks, 1) == gridDim.x * gridDim.y - 1) {
        state->blocks = 0;
        state->step = step;
        state->repeat = repeat;
    }
}

__device__ __forceinline__ const sdedit_row *rows_of(const sdedit_edit &edit, uint32_t image) {
    const uint32_t table = edit.tables == 1 ? 0 : image;
    return reinterpret_cast<const sdedit_row *>(edit.table) + (size_t)table * edit.steps;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) sdedit_start(sdedit_edit edit) {
    sdedit_state *state = reinterpret_cast<sdedit_state *>(edit.state);
    const uint32_t image = blockIdx.y, block = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t first = 4 * block, repeat = state->repeat + (state->step != 0);
    if (edit.interface != SDEDIT_INTERFACE) {  // and the step stays 0: nothing runs
        state->fault = SDEDIT_WRONG_INTERFACE;
        return;
    }
    if (first < edit.elements) {
        const sdedit_row *rows = rows_of(edit, image);
        const uint32_t count = edit.elements - first;
        const bool aligned = edit.elements % 4 == 0;
        const size_t at = (size_t)image * edit.elements + first;
        const normals noise = sdedit::draw(edit.seeds[image], block, 0, repeat, sdedit::STREAM_STATE);
        quad x = load((repeat == 0 ? edit.guide : edit.x) + at, count, aligned);
        if (repeat != 0 && edit.mask) {
            const quad guide = load(edit.guide + at, count, aligned);
            const quad mask = load_mask(edit.mask + (size_t)image * edit.plane, first, count, edit.plane);
            for (int k = 0; k < 4; ++k) x.v[k] = sdedit::blend(guide.v[k], x.v[k], mask.v[k]);
        }
        for (int k = 0; k < 4; ++k) x.v[k] = sdedit::add(x.v[k], sdedit::mul(rows->sigma, noise.z[k]));
        store(edit.x + at, x, count, aligned);
        if (block == 0) edit.sigma[image] = rows->sigma;
    }
    finish(state, 1, repeat);
}

extern "C" __global__ void __launch_bounds__(256) sdedit_step(sdedit_edit edit) {
    sdedit_state *state = reinterpret_cast<sdedit_state *>(edit.state);
    const uint32_t image = blockIdx.y, block = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t first = 4 * block, step = state->step, repeat = state->repeat;
    if (step - 1 >= edit.steps) return;  // not started (0 wraps around), or done
    if (first < edit.elements) {
        const sdedit_row row = rows_of(edit, image)[step - 1];
        const uint32_t count = edit.elements - first;
        const bool aligned = edit.elements % 4 == 0, last = step == edit.steps;
        const size_t at = (size_t)image * edit.elements + first;
        const uint64_t seed = edit.seeds[image];

        const quad denoised = load(edit.denoised + at, count, aligned);
        bool finite = true;
        for (int k = 0; k < 4; ++k) finite &= fabsf(denoised.v[k]) <= 3.402823466e+38f;
        if (!finite) atomicCAS(&state->fault, 0u, repeat * edit.steps + step);

        quad x = load(edit.x + at, count, aligned), previous = denoised;
        normals noise = {};
        if (row.d != 0) previous = load(edit.previous + at, count, aligned);
        if (row.c != 0) noise = sdedit::draw(seed, block, step, repeat, sdedit::STREAM_STATE);
        for (int k = 0; k < 4; ++k) {
            x.v[k] = sdedit::update(row, x.v[k], denoised.v[k], previous.v[k], noise.z[k]);
        }
        if (edit.mask && !last) {
            const quad guide = load(edit.guide + at, count, aligned);
            const quad mask = load_mask(edit.mask + (size_t)image * edit.plane, first, count, edit.plane);
            noise = sdedit::draw(seed, block, step, repeat, sdedit::STREAM_MASK);
            for (int k = 0; k < 4; ++k) {
                x.v[k] = sdedit::composite(row, x.v[k], guide.v[k], mask.v[k], noise.z[k]);
            }
        }
        store(edit.x + at, x, count, aligned);
        if (edit.previous) store(edit.previous + at, denoised, count, aligned);
        if (block == 0) edit.sigma[image] = last ? row.sigma_next : rows_of(edit, image)[step].sigma;
    }
    finish(state, step + 1, repeat);
}

extern "C" __global__ void __launch_bounds__(256) sdedit_pixels(sdedit_edit edit) {
    const uint32_t image = blockIdx.y, at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= edit.plane) return;
    const uint32_t channels = edit.elements / edit.plane;
    const float *x = edit.x + (size_t)image * edit.elements + at;
    uint8_t *out = edit.pixels + ((size_t)image * edit.plane + at) * channels;
    for (uint32_t c = 0; c < channels; ++c) out[c] = sdedit::pixel(x[(size_t)c * edit.plane]);
}
