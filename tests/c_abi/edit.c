/* A C11 program that edits with libsdedit and prints what it got: edit < INPUT > OUTPUT.
 *
 * INPUT: uint32 images, channels, plane, steps, tables, repeats, masked; then uint64 seeds[images], float32
 * table[tables * steps * 6], uint8 pixels[images * plane * channels], float32 mask[images * plane] where masked.
 * OUTPUT: float32 x, uint8 pixels, and the final float32 sigma[images]. The network is D = x / 2 + 1 / 4.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "sdedit.h"

static void *need(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory) exit(1);
    return memory;
}

static void *input(size_t count, size_t size) {
    void *memory = need(count, size);
    if (fread(memory, size, count, stdin) != count) exit(1);
    return memory;
}

static void ensure(int result) {
    if (result == SDEDIT_OK) return;
    fprintf(stderr, "%s\n", sdedit_message(result));
    exit(1);
}

int main(void) {
    if (sdedit_interface() != SDEDIT_C_INTERFACE) return 1;

    uint32_t *head = input(7, sizeof *head);
    const size_t planes = (size_t)head[0] * head[2], elements = planes * head[1];
    float *x = need(elements, sizeof *x), *denoised = need(elements, sizeof *denoised);
    float *guide = need(elements, sizeof *guide), *sigma = need(head[0], sizeof *sigma);
    struct sdedit_batch batch = {
        .version = SDEDIT_C_INTERFACE,
        .images = head[0],
        .channels = head[1],
        .plane = head[2],
        .steps = head[3],
        .tables = head[4],
        .x = x,
        .sigma = sigma,
        .denoised = denoised,
        .previous = need(elements, sizeof(float)),
        .guide = guide,
    };
    batch.seeds = input(head[0], sizeof *batch.seeds);
    batch.table = input((size_t)head[4] * head[3] * 6, sizeof(float));
    uint8_t *pixels = input(elements, 1);
    if (head[6]) batch.mask = input(planes, sizeof(float));

    ensure(sdedit_guide(&batch, pixels, guide));
    for (uint32_t repeat = 0; repeat < head[5]; ++repeat) {
        ensure(sdedit_perturb(&batch, repeat));
        for (uint32_t step = 1; step <= batch.steps; ++step) {
            for (size_t i = 0; i < elements; ++i) denoised[i] = x[i] * 0.5f + 0.25f;
            ensure(sdedit_step(&batch, step, repeat));
        }
    }
    ensure(sdedit_pixels(&batch, pixels));
    fwrite(x, sizeof *x, elements, stdout);
    fwrite(pixels, 1, elements, stdout);
    fwrite(sigma, sizeof *sigma, head[0], stdout);
    return fflush(stdout) ? 1 : 0;
}
