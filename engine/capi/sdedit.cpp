// The functions of sdedit.h, from the header that the GPU's kernels are made of.
//
// By hand: g++ -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC -shared -o libsdedit.so
// sdedit.cpp; with MSVC cl /std:c++17 /O2 /fp:precise /LD sdedit.cpp. -ffp-contract=off is what keeps the bits.
#define SDEDIT_BUILDS_LIBRARY
#include "sdedit.h"

#include <stddef.h>

#include "../cuda/sdedit.cuh"

// The vector units of x86-64: the best that the processor has is chosen when the library is loaded. Bits are the same.
#if defined(SDEDIT_EACH_VECTOR_UNIT)
#define EACH_VECTOR_UNIT __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EACH_VECTOR_UNIT
#endif

namespace {

constexpr uint32_t BLOCKS_AT_ONCE = 256;  // their noise stays in the innermost cache

// The batch, one image of it at a time.
struct image_view {
    float *x;
    const float *denoised;
    float *previous;
    const float *guide, *mask;
    uint32_t plane;
    const sdedit_row *rows;
    uint64_t seed;
};

float mask_at(const image_view &image, size_t element) { return image.mask[(uint32_t)element % image.plane]; }

// The mask of `count` elements from `start` on; every channel has the same.
void copy_mask(const image_view &image, size_t start, uint32_t count, float *mask) {
    uint32_t at = (uint32_t)start % image.plane;
    for (uint32_t i = 0; i < count; ++i) {
        mask[i] = image.mask[at];
        if (++at == image.plane) at = 0;
    }
}

image_view view(const sdedit_batch &batch, uint32_t image) {
    const size_t elements = (size_t)batch.channels * batch.plane, at = image * elements;
    const size_t table = batch.tables == 1 ? 0 : (size_t)image * batch.steps;
    return {
        batch.x + at,
        batch.denoised ? batch.denoised + at : nullptr,
        batch.previous ? batch.previous + at : nullptr,
        batch.guide ? batch.guide + at : nullptr,
        batch.mask ? batch.mask + (size_t)image * batch.plane : nullptr,
        batch.plane,
        reinterpret_cast<const sdedit_row *>(batch.table) + table,
        batch.seeds[image],
    };
}

int check_size(const sdedit_batch *batch) {
    if (!batch) return SDEDIT_BAD_ARGUMENT;
    if (batch->version != SDEDIT_C_INTERFACE) return SDEDIT_OTHER_INTERFACE;
    if (!batch->images || !batch->channels || !batch->plane) return SDEDIT_BAD_ARGUMENT;
    return (uint64_t)batch->channels * batch->plane <= UINT32_MAX ? SDEDIT_OK : SDEDIT_BAD_ARGUMENT;
}

int check(const sdedit_batch *batch) {
    if (const int bad = check_size(batch)) return bad;
    if (!batch->x || !batch->sigma || !batch->table || !batch->seeds || !batch->steps) return SDEDIT_BAD_ARGUMENT;
    if (batch->tables != 1 && batch->tables != batch->images) return SDEDIT_BAD_ARGUMENT;
    return batch->mask && !batch->guide ? SDEDIT_BAD_ARGUMENT : SDEDIT_OK;
}

// Normals of whole blocks, from block `first` on.
EACH_VECTOR_UNIT void draw_blocks(uint64_t seed, uint32_t first, uint32_t blocks, uint32_t step, uint32_t repeat,
                                  sdedit::stream which, float *z) {
    for (uint32_t block = 0; block < blocks; ++block) {
        const sdedit::normals four = sdedit::draw(seed, first + block, step, repeat, which);
        for (size_t k = 0; k < 4; ++k) z[4 * (size_t)block + k] = four.z[k];
    }
}

// Normals of `count` elements from block `first` on; the buffer has room for whole blocks.
void draw(const image_view &image, uint32_t first, uint32_t count, uint32_t step, uint32_t repeat,
          sdedit::stream which, float *z) {
    draw_blocks(image.seed, first, (count + 3) / 4, step, repeat, which, z);
}

EACH_VECTOR_UNIT bool all_finite(const float *values, size_t count) {
    uint32_t bad = 0;
    for (size_t i = 0; i < count; ++i) bad |= !(fabsf(values[i]) <= 3.402823466e+38f);
    return !bad;
}

EACH_VECTOR_UNIT void update(const sdedit_row &row, float *x, const float *denoised, const float *previous,
                             const float *z, uint32_t count) {
    const sdedit_row r = row;
    for (uint32_t i = 0; i < count; ++i) x[i] = sdedit::update(r, x[i], denoised[i], previous[i], z[i]);
}

EACH_VECTOR_UNIT void composite(const sdedit_row &row, float *x, const float *guide, const float *mask, const float *z,
                                uint32_t count) {
    const sdedit_row r = row;
    for (uint32_t i = 0; i < count; ++i) x[i] = sdedit::composite(r, x[i], guide[i], mask[i], z[i]);
}

// Calls work(start, count, first block) for pieces of an image.
template <typename Work>
void in_pieces(uint32_t elements, Work work) {
    const uint64_t most = 4 * BLOCKS_AT_ONCE;
    for (uint64_t start = 0; start < elements; start += most) {
        const uint64_t left = elements - start;
        work((size_t)start, (uint32_t)(left < most ? left : most), (uint32_t)(start / 4));
    }
}

}  // namespace

extern "C" {

uint32_t sdedit_interface(void) { return SDEDIT_C_INTERFACE; }

const char *sdedit_noise(void) { return "philox-bm24-v1"; }

const char *sdedit_message(int result) {
    switch (result) {
        case SDEDIT_OK: return "done";
        case SDEDIT_OTHER_INTERFACE: return "the library has another interface version than the program";
        case SDEDIT_BAD_ARGUMENT: return "a pointer that is needed is null, or a size or step is out of range";
        case SDEDIT_NOT_FINITE: return "the network returned NaN or Inf";
    }
    return "not a result of this library";
}

void sdedit_normals(uint64_t seed, uint32_t step, uint32_t repeat, enum sdedit_stream stream, uint32_t elements,
                    float *out) {
    const sdedit::stream which = (sdedit::stream)stream;
    const uint32_t whole = elements / 4;
    draw_blocks(seed, 0, whole, step, repeat, which, out);
    if (elements % 4 == 0) return;
    const sdedit::normals four = sdedit::draw(seed, whole, step, repeat, which);
    for (uint32_t k = 0; k < elements % 4; ++k) out[4 * (size_t)whole + k] = four.z[k];
}

int sdedit_perturb(const struct sdedit_batch *batch, uint32_t repeat) {
    if (const int bad = check(batch)) return bad;
    if (repeat == 0 && !batch->guide) return SDEDIT_BAD_ARGUMENT;
    for (uint32_t number = 0; number < batch->images; ++number) {
        const image_view image = view(*batch, number);
        const float sigma = image.rows->sigma;
        in_pieces(batch->channels * batch->plane, [&](size_t start, uint32_t count, uint32_t first) {
            float z[4 * BLOCKS_AT_ONCE];
            draw(image, first, count, 0, repeat, sdedit::STREAM_STATE, z);
            float *x = image.x + start;
            for (uint32_t i = 0; i < count; ++i) {
                float from = repeat == 0 ? image.guide[start + i] : x[i];
                if (repeat != 0 && image.mask) {
                    from = sdedit::blend(image.guide[start + i], from, mask_at(image, start + i));
                }
                x[i] = sdedit::add(from, sdedit::mul(sigma, z[i]));
            }
        });
        batch->sigma[number] = sigma;
    }
    return SDEDIT_OK;
}

int sdedit_step(const struct sdedit_batch *batch, uint32_t step, uint32_t repeat) {
    if (const int bad = check(batch)) return bad;
    if (!batch->denoised || step < 1 || step > batch->steps) return SDEDIT_BAD_ARGUMENT;
    const uint32_t elements = batch->channels * batch->plane;
    for (size_t row = 0; row < (size_t)batch->tables * batch->steps && !batch->previous; ++row) {
        if (reinterpret_cast<const sdedit_row *>(batch->table)[row].d != 0) return SDEDIT_BAD_ARGUMENT;
    }
    if (!all_finite(batch->denoised, (size_t)batch->images * elements)) return SDEDIT_NOT_FINITE;
    const bool last = step == batch->steps;
    for (uint32_t number = 0; number < batch->images; ++number) {
        const image_view image = view(*batch, number);
        const sdedit_row row = image.rows[step - 1];
        in_pieces(elements, [&](size_t start, uint32_t count, uint32_t first) {
            float z[4 * BLOCKS_AT_ONCE] = {};
            float *x = image.x + start;
            const float *denoised = image.denoised + start;
            const float *previous = row.d != 0 ? image.previous + start : denoised;
            if (row.c != 0) draw(image, first, count, step, repeat, sdedit::STREAM_STATE, z);
            update(row, x, denoised, previous, z, count);
            if (image.previous) memcpy(image.previous + start, denoised, count * sizeof(float));
            if (!image.mask || last) return;
            draw(image, first, count, step, repeat, sdedit::STREAM_MASK, z);
            float mask[4 * BLOCKS_AT_ONCE];
            copy_mask(image, start, count, mask);
            composite(row, x, image.guide + start, mask, z, count);
        });
        batch->sigma[number] = last ? row.sigma_next : image.rows[step].sigma;
    }
    return SDEDIT_OK;
}

int sdedit_pixels(const struct sdedit_batch *batch, uint8_t *pixels) {
    if (const int bad = check_size(batch)) return bad;
    if (!batch->x || !pixels) return SDEDIT_BAD_ARGUMENT;
    const float *x = batch->x;
    for (uint32_t image = 0; image < batch->images; ++image) {
        for (uint32_t c = 0; c < batch->channels; ++c) {
            for (size_t at = 0; at < batch->plane; ++at) pixels[at * batch->channels + c] = sdedit::pixel(*x++);
        }
        pixels += (size_t)batch->plane * batch->channels;
    }
    return SDEDIT_OK;
}

int sdedit_guide(const struct sdedit_batch *batch, const uint8_t *pixels, float *guide) {
    if (const int bad = check_size(batch)) return bad;
    if (!pixels || !guide) return SDEDIT_BAD_ARGUMENT;
    for (uint32_t image = 0; image < batch->images; ++image) {
        for (uint32_t c = 0; c < batch->channels; ++c) {
            for (size_t at = 0; at < batch->plane; ++at) {
                *guide++ = sdedit::sub((float)pixels[at * batch->channels + c] / 127.5f, 1.0f);
            }
        }
        pixels += (size_t)batch->plane * batch->channels;
    }
    return SDEDIT_OK;
}

}  // extern "C"
