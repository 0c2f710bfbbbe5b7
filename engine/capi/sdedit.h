/* The noise and the arithmetic of SDEdit for any program that can call C.
 *
 * SDEdit edits an image, the guide, with a denoiser: a network D that is given an image x with Gaussian noise of
 * standard deviation sigma on it, and returns its estimate of the image without noise. Noise is added to the guide,
 * and then taken away in N steps, from a high sigma to 0. This library does everything but the network:
 *
 *     struct sdedit_batch batch = {SDEDIT_C_INTERFACE, ...};
 *     sdedit_perturb(&batch, 0);                     x = guide + sigma z
 *     for (uint32_t step = 1; step <= N; ++step) {
 *         denoised = D(x, sigma)                     your network; both inputs are in the batch
 *         sdedit_step(&batch, step, 0);              x and sigma move on to the next, lower level
 *     }
 *     sdedit_pixels(&batch, pixels);                 x as 8-bit pixels
 *
 * The numbers of every step are rows of a table, one for each step, which `sdedit inspect --json --t0 0.5 --steps 20
 * MODEL.onnx` prints. z is noise of the specification philox-bm24-v1: a function of a seed and of where it is used,
 * the same bits on every machine. All arithmetic is IEEE float32, each operation rounded by itself, so that equal
 * networks give equal bits here, in Python and on a GPU.
 *
 * Every array is float32, in C order, and the caller's; nothing is allocated or kept. Images are [B, C, H, W], data in
 * [-1, 1]. Functions may be called from several threads as long as these do not share arrays that are written. One
 * call uses one thread: to use more, give each a batch of its own images. Images do not depend on their batch.
 *
 * Build: python -m sdedit.capi.build -o FOLDER, or compile sdedit.cpp as said there.
 */
#ifndef SDEDIT_H
#define SDEDIT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32) && defined(SDEDIT_BUILDS_LIBRARY)
#define SDEDIT_API __declspec(dllexport)
#elif defined(_WIN32)
#define SDEDIT_API __declspec(dllimport)
#elif defined(__GNUC__)
#define SDEDIT_API __attribute__((visibility("default")))
#else
#define SDEDIT_API
#endif

/* Of this header. Raised when a function or the structure changes in a way that old programs do not survive. */
#define SDEDIT_C_INTERFACE 1

/* What functions return. */
enum sdedit_result {
    SDEDIT_OK = 0,
    SDEDIT_OTHER_INTERFACE = 1, /* batch->version is not the library's */
    SDEDIT_BAD_ARGUMENT = 2,    /* a null pointer, a size of 0, a step that the table does not have */
    SDEDIT_NOT_FINITE = 3       /* the network returned NaN or Inf; x is as it was */
};

/* What the noise is for: two uses never share numbers. */
enum sdedit_stream {
    SDEDIT_STREAM_STATE = 0, /* x's own noise */
    SDEDIT_STREAM_MASK = 1   /* the noise of the parts that a mask keeps */
};

/* A batch of B images, C * H * W elements each. */
struct sdedit_batch {
    uint32_t version;      /* SDEDIT_C_INTERFACE */
    uint32_t images;       /* B */
    uint32_t channels;     /* C */
    uint32_t plane;        /* H * W */
    uint32_t steps;        /* N */
    uint32_t tables;       /* 1: the same table for all; B: one for each image */
    float *x;              /* [B, C, H, W] the state, and the network's input; holds the result in the end */
    float *sigma;          /* [B] its noise level, the network's other input */
    const float *denoised; /* [B, C, H, W] the network's output D(x, sigma) */
    float *previous;       /* [B, C, H, W] kept by sdedit_step: D of the step before; null where d is 0 in all rows */
    const float *guide;    /* [B, C, H, W] in [-1, 1] */
    const float *mask;     /* [B, H, W] in [0, 1], 1 = repaint, 0 = keep the guide; null: repaint all */
    const float *table;    /* [tables, N, 6] columns sigma, a, b, c, d, sigma_next, from the highest sigma down */
    const uint64_t *seeds; /* [B] one for each image */
};

/* The SDEDIT_C_INTERFACE that the library was built with. A program compares it with its own, once. */
SDEDIT_API uint32_t sdedit_interface(void);

/* The noise's specification, "philox-bm24-v1". */
SDEDIT_API const char *sdedit_noise(void);

/* A result in words. */
SDEDIT_API const char *sdedit_message(int result);

/* Standard normals: out[0] ... out[elements - 1] for an image of that many elements in C order over (C, H, W).
 *
 * step: 0 for the first noise on the guide, 1 ... N for the steps. repeat: which pass, from 0. stream: see above.
 * The same arguments give the same numbers, always; a larger image begins with the smaller one's.
 */
SDEDIT_API void sdedit_normals(uint64_t seed, uint32_t step, uint32_t repeat, enum sdedit_stream stream,
                               uint32_t elements, float *out);

/* Begin a pass: x = guide + sigma z, and sigma. Reads guide, table, seeds.
 *
 * repeat: 0. An edit may have further passes, numbered 1, 2, ..., each of which noises the last one's result instead:
 * then x is read, and the mask. The network is not asked.
 */
SDEDIT_API int sdedit_perturb(const struct sdedit_batch *batch, uint32_t repeat);

/* One step, after the network has written denoised: x' = a x + b D + d (D - D_previous) + c z, in place. Every product and
 * sum is rounded to float32, in this order: (a x + (b D + d (D - D_previous))) + c z.
 *
 * step: 1 ... N in this order. sigma gets the next step's level, 0 after the last. With a mask, kept parts become the
 * guide at the level just reached, x' = m x' + (1 - m) guide + sigma' sqrt(1 - m^2) z; after the last step they hold
 * what the network made of them: paste the guide's own pixels over them. Returns SDEDIT_NOT_FINITE before it changes
 * anything.
 */
SDEDIT_API int sdedit_step(const struct sdedit_batch *batch, uint32_t step, uint32_t repeat);

/* x as pixels, [B, H, W, C]: [-1, 1] -> 0 ... 255, clipped, rounded to nearest. */
SDEDIT_API int sdedit_pixels(const struct sdedit_batch *batch, uint8_t *pixels);

/* Pixels [B, H, W, C] as a guide [B, C, H, W]: v / 127.5 - 1. Only the sizes of the batch are read. */
SDEDIT_API int sdedit_guide(const struct sdedit_batch *batch, const uint8_t *pixels, float *guide);

#ifdef __cplusplus
}
#endif

#endif
