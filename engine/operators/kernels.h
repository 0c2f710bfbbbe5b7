// What operators.cpp has computed: kernels.cpp is compiled once for each vector unit.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct conv_shape {
    int n, ci, h, w, co, out_h, out_w, kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x;
};

// (co, ci, kernel_h, kernel_w), or (ci, co) of a linear layer: floats from one output or input channel to the next.
struct conv_weights {
    const float *data;
    size_t row, channel;
};

// y (n, co, out_h, out_w) = the convolution of x (n, ci, h, w) + bias (co) + add
struct conv_call {
    conv_shape shape;
    const float *x, *packed, *bias, *add;  // packed: the weights, by pack_weights; bias and add may be null
    size_t add_image_stride, add_channel_stride;
    bool add_is_constant;  // one number a channel, not as many as pixels
    float *y;
};

// y (n, channels, plane) = modulation of the group norm of x, with scale and shift (channels); then SiLU
struct norm_call {
    const float *x, *scale, *shift, *modulation_scale, *modulation_shift;  // modulation may be null
    size_t scale_image_stride, scale_channel_stride, shift_image_stride, shift_channel_stride;  // of the modulation
    float *y;
    int64_t plane;
    int channels, groups;
    float epsilon;
    bool silu;
};

// Floats from one picture, head, row and column to the next.
struct head_strides {
    size_t picture, head, row, column;
};

// y (heads, queries, values) = softmax(scale · q kᵀ) v, with q (heads, queries, depth), k (heads, keys, depth) and
// v (heads, keys, values), of every picture
struct attention_call {
    const float *q, *k, *v;
    float *y;
    head_strides of_q, of_k, of_v, of_y;
    float scale;
    int pictures, heads, queries, keys, depth, values;
};

struct attention_layout {
    int blocks;                                    // of queries, of a head
    size_t key_floats, head_floats, block_floats;  // packed keys; with the values; what a block needs while it is made
};

// How a convolution is computed, and how its columns (tiles, or pixels of the output) are laid into blocks.
struct layout {
    bool winograd, half, at_once;   // half: in half precision; at_once: all inputs are packed before the first product
    int run, tiles_x, tiles_y;      // tiles side by side in a vector; of a picture, tiles_x a multiple of run
    int64_t columns;                // of the whole batch
    int vectors, width;             // of a block; width in columns
    int all_blocks, blocks, units;  // blocks of the batch, of a unit of work; units
    int groups, panels, depth;      // of output channels; matrices; their inner dimension
    size_t panel_floats, block_floats, weight_floats;  // packed: input of a block, weights of the layer
};

enum half_format { NO_HALVES, FP16, BF16 };

struct kernels {
    half_format halves;  // that are meant by `half` below
    layout (*lay_out)(const conv_shape &, bool half, int threads);
    void (*pack_weights)(const conv_shape &, const layout &, const conv_weights &, int group, float *packed);
    void (*pack)(const conv_call &, const layout &, int block, int count, int from, int to, float *input);
    void (*compute)(const conv_call &, const layout &, int block, int group, const float *input);
    void (*normalize)(const norm_call &, int64_t unit);  // one group of one picture
    attention_layout (*lay_out_attention)(const attention_call &);
    void (*pack_head)(const attention_call &, const attention_layout &, int head, float *packed);  // of all pictures'
    void (*attend)(const attention_call &, const attention_layout &, int head, int block, const float *packed,
                   float *own);
};

extern const kernels kernels_v3, kernels_v4, kernels_bf16, kernels_fp16;
