// Operators for ONNX Runtime's CPU provider, of domain "sdedit", for float32:
//
//   Conv(x, weights, bias?, add?)                    attributes pads, strides, half (0: float32, 1: IEEE's halves,
//                                                    2: bfloat16); weights are constant, (co, ci, height, width) or,
//                                                    of a linear layer, (ci, co)
//   GroupNorm(x, scale, shift, modulation_scale?, modulation_shift?)
//                                                    attributes groups, epsilon, silu
//   Attention(q, k, v, factor?, factor?)             attributes scale, keys_are_rows, values_are_rows; heads_inside:
//                                                    q, k, v and the result are (n, rows, heads, columns) then;
//                                                    heads: if not 0, they are (n, heads · columns, rows ...), and so
//                                                    may have a height and a width
//
// As onnxruntime_c_api.h wants it: RegisterCustomOps is what a session is given. They are for graphs that this engine
// has rewritten; what a graph cannot ask for is an error, not a crash. They tell no shapes before they run: the arena
// serves their outputs.
#include <onnxruntime_c_api.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <initializer_list>

#include "kernels.h"

#define TRY(call)                                        \
    do {                                                 \
        if (OrtStatus *failure = (call)) return failure; \
    } while (0)

namespace {

constexpr uint32_t API = 20;  // ONNX Runtime 1.20
constexpr int BEST_UNIT = 6;  // x86-64-v4 with AVX512-FP16

const OrtApi *api;
const kernels *best;
// The cores that this process had when the library was registered: work and memory are cut for as many, also in a
// session of fewer threads.
int threads;

OrtStatus *refuse(const char *text) { return api->CreateStatus(ORT_INVALID_GRAPH, text); }
OrtStatus *no_memory() { return api->CreateStatus(ORT_FAIL, "out of memory"); }

// Calls work(unit, worker) for every unit, in the threads of the session; worker < min(units, threads), and units of
// one worker do not overlap in time.
template <class Work>
OrtStatus *parallel_for(const OrtKernelContext *context, size_t units, Work work) {
    struct {
        Work &work;
        std::atomic<size_t> next;
        size_t units;
    } shared = {work, {0}, units};
    const auto run = [](void *data, size_t worker) {
        auto &all = *static_cast<decltype(shared) *>(data);
        for (size_t unit; (unit = all.next.fetch_add(1)) < all.units;) all.work(unit, worker);
    };
    return api->KernelContext_ParallelFor(context, run, units < (size_t)threads ? units : threads, 0, &shared);
}

struct tensor {
    const float *data;  // null where an optional input is left out
    size_t rank;
    int64_t dims[4];
};

OrtStatus *read(const OrtValue *value, tensor &out) {
    OrtTensorTypeAndShapeInfo *info;
    TRY(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = api->GetDimensionsCount(info, &out.rank);
    if (!status && out.rank > 4) status = refuse("more than four dimensions");
    if (!status) status = api->GetDimensions(info, out.dims, out.rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    void *data;
    TRY(api->GetTensorMutableData(const_cast<OrtValue *>(value), &data));
    out.data = static_cast<const float *>(data);
    return nullptr;
}

OrtStatus *read_input(const OrtKernelContext *context, size_t index, tensor &out) {
    out = {};
    size_t count;
    TRY(api->KernelContext_GetInputCount(context, &count));
    const OrtValue *value = nullptr;
    if (index < count) TRY(api->KernelContext_GetInput(context, index, &value));
    return value ? read(value, out) : nullptr;
}

OrtStatus *make_output(OrtKernelContext *context, const int64_t *dims, size_t rank, float *&out) {
    OrtValue *value;
    void *data;
    TRY(api->KernelContext_GetOutput(context, 0, dims, rank, &value));
    TRY(api->GetTensorMutableData(value, &data));
    out = static_cast<float *>(data);
    return nullptr;
}

// With ones before its dimensions, so that there are four.
tensor as_rank_4(const tensor &t) {
    tensor out = {t.data, 4, {1, 1, 1, 1}};
    for (size_t k = 0; k < t.rank; ++k) out.dims[4 - t.rank + k] = t.dims[k];
    return out;
}

// Floats from one picture and one channel to the next of a tensor that is broadcast along dimensions of one.
void strides_of(const tensor &t, size_t &image, size_t &channel) {
    const size_t plane = t.dims[2] * t.dims[3];
    image = t.dims[0] == 1 ? 0 : t.dims[1] * plane;
    channel = t.dims[1] == 1 ? 0 : plane;
}

// The session's memory, for as long as a kernel runs.
struct scratch {
    OrtAllocator *allocator = nullptr;
    float *data = nullptr;

    OrtStatus *take(const OrtKernelContext *context, size_t floats) {
        OrtMemoryInfo *info;
        TRY(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info));
        OrtStatus *status = api->KernelContext_GetAllocator(context, info, &allocator);
        api->ReleaseMemoryInfo(info);
        if (status) return status;
        void *memory = nullptr;
        TRY(api->AllocatorAlloc(allocator, floats * sizeof(float), &memory));
        data = static_cast<float *>(memory);
        return nullptr;
    }
    ~scratch() {
        if (data) api->ReleaseStatus(api->AllocatorFree(allocator, data));
        if (allocator) api->ReleaseAllocator(allocator);
    }
};

template <class Kernel>
OrtStatus *keep(const Kernel &made, void **out) {
    *out = malloc(sizeof(Kernel));
    if (!*out) return no_memory();
    memcpy(*out, &made, sizeof(Kernel));
    return nullptr;
}

// --- Conv --------------------------------------------------------------------------------------------------------

struct conv_kernel {
    int64_t strides[2], pads[4], half;
    tensor weights;     // as if of four dimensions
    conv_weights held;  // how they lie
    pthread_mutex_t mutex;
    const kernels *unit;                  // that packs and computes
    float *packed, *packed_for_winograd;  // null until they are used
};

OrtStatus *ORT_API_CALL make_conv(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *info, void **out) {
    conv_kernel made = {};
    size_t two = 2, four = 4;
    TRY(api->KernelInfoGetAttributeArray_int64(info, "strides", made.strides, &two));
    TRY(api->KernelInfoGetAttributeArray_int64(info, "pads", made.pads, &four));
    if (two != 2 || four != 4) return refuse("Conv: wanted two strides and four pads");
    for (const int64_t stride : made.strides) {
        if (stride < 1) return refuse("Conv: a stride is not positive");
    }
    for (const int64_t pad : made.pads) {
        if (pad < 0) return refuse("Conv: a pad is negative");
    }
    TRY(api->KernelInfoGetAttribute_int64(info, "half", &made.half));
    made.unit = best;
    if (made.half < NO_HALVES || made.half > BF16) return refuse("Conv: half is not 0, 1 or 2");
    if (made.half != NO_HALVES && made.half != made.unit->halves) {
        return refuse(made.half == BF16 ? "Conv: in bfloat16 it needs a processor with AVX512-BF16 and no AVX512-FP16"
                                        : "Conv: in half precision it needs a processor with AVX512-FP16");
    }
    int constant = 0;
    const OrtValue *weights = nullptr;
    TRY(api->KernelInfoGetConstantInput_tensor(info, 1, &constant, &weights));
    if (!constant) return refuse("Conv: its weights are not constant");
    TRY(read(weights, made.weights));
    int64_t *dims = made.weights.dims;
    if (made.weights.rank == 2) {  // a linear layer's (ci, co)
        made.held = {made.weights.data, 1, (size_t)dims[1]};
        made.weights = {made.weights.data, 4, {dims[1], dims[0], 1, 1}};
    } else if (made.weights.rank == 4) {
        made.held = {made.weights.data, (size_t)(dims[1] * dims[2] * dims[3]), (size_t)(dims[2] * dims[3])};
    } else {
        return refuse("Conv: its weights are not of four dimensions, or of two");
    }
    for (const int64_t size : made.weights.dims) {
        if (size < 1) return refuse("Conv: its weights are none");
    }
    TRY(keep(made, out));
    pthread_mutex_init(&static_cast<conv_kernel *>(*out)->mutex, nullptr);
    return nullptr;
}

void ORT_API_CALL drop_conv(void *data) {
    auto *kernel = static_cast<conv_kernel *>(data);
    free(kernel->packed);
    free(kernel->packed_for_winograd);
    pthread_mutex_destroy(&kernel->mutex);
    free(kernel);
}

OrtStatus *packed_weights(conv_kernel *kernel, const OrtKernelContext *context, const conv_shape &shape,
                          const layout &l, const float *&packed) {
    OrtStatus *status = nullptr;
    pthread_mutex_lock(&kernel->mutex);
    float *&kept = l.winograd ? kernel->packed_for_winograd : kernel->packed;
    if (!kept) {
        void *memory = nullptr;
        if (posix_memalign(&memory, 64, l.weight_floats * sizeof(float)) != 0) {
            status = no_memory();
        } else {
            auto *made = static_cast<float *>(memory);
            status = parallel_for(context, l.groups, [&](size_t group, size_t) {
                kernel->unit->pack_weights(shape, l, kernel->held, (int)group, made);
            });
            if (status) free(memory);
            else kept = made;
        }
    }
    packed = kept;
    pthread_mutex_unlock(&kernel->mutex);
    return status;
}

// A unit packs its own inputs: of large pictures.
OrtStatus *convolve_units(const OrtKernelContext *context, const kernels &unit, const conv_call &call,
                          const layout &l) {
    const size_t floats = l.blocks * l.block_floats;
    scratch input;
    TRY(input.take(context, floats * (l.units < threads ? l.units : threads)));
    return parallel_for(context, l.units, [&](size_t number, size_t worker) {
        const int first = (int)number * l.blocks;
        const int count = l.all_blocks - first < l.blocks ? l.all_blocks - first : l.blocks;
        float *own = input.data + worker * floats;
        unit.pack(call, l, first, count, 0, call.shape.ci, own);
        for (int group = 0; group < l.groups; ++group) {
            for (int k = 0; k < count; ++k) unit.compute(call, l, first + k, group, own + k * l.block_floats);
        }
    });
}

// All inputs are packed, then come all products: of small pictures.
OrtStatus *convolve_at_once(const OrtKernelContext *context, const kernels &unit, const conv_call &call,
                            const layout &l) {
    scratch input;
    TRY(input.take(context, l.all_blocks * l.block_floats));
    const int channels = call.shape.ci, pieces = channels < 2 * threads ? 1 : 2 * threads;
    TRY(parallel_for(context, (size_t)l.all_blocks * pieces, [&](size_t number, size_t) {
        const int64_t block = number / pieces, piece = number % pieces;
        const int from = (int)(channels * piece / pieces) & ~1;  // two channels may share a row
        const int to = piece + 1 == pieces ? channels : (int)(channels * (piece + 1) / pieces) & ~1;
        unit.pack(call, l, (int)block, 1, from, to, input.data + block * l.block_floats);
    }));
    return parallel_for(context, (size_t)l.all_blocks * l.groups, [&](size_t number, size_t) {
        const int64_t block = number % l.all_blocks, group = number / l.all_blocks;
        unit.compute(call, l, (int)block, (int)group, input.data + block * l.block_floats);
    });
}

OrtStatus *convolve(conv_kernel *kernel, const OrtKernelContext *context, conv_call &call) {
    conv_shape &s = call.shape;
    const bool one = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_y == 1 && s.stride_x == 1;
    if (one && s.pad_y == 0 && s.pad_x == 0 && s.h == s.out_h && s.w == s.out_w) {
        s.w = s.out_w = s.w * s.h;  // pixels without neighbours: one line of them
        s.h = s.out_h = 1;
    }
    const layout l = kernel->unit->lay_out(s, kernel->half != 0, threads);
    TRY(packed_weights(kernel, context, s, l, call.packed));
    return l.at_once ? convolve_at_once(context, *kernel->unit, call, l)
                     : convolve_units(context, *kernel->unit, call, l);
}

// y (dims) = a + b, both broadcast along their dimensions of one.
void add_broadcast(const tensor &a, const tensor &b, const int64_t *dims, float *y) {
    size_t step[2][4];
    const tensor *both[] = {&a, &b};
    for (int t = 0; t < 2; ++t) {
        size_t size = 1;
        for (int k = 3; k >= 0; size *= both[t]->dims[k--]) step[t][k] = both[t]->dims[k] == 1 ? 0 : size;
    }
    for (int64_t n = 0; n < dims[0]; ++n) {
        for (int64_t c = 0; c < dims[1]; ++c) {
            for (int64_t h = 0; h < dims[2]; ++h) {
                for (int64_t w = 0; w < dims[3]; ++w) {
                    *y++ = a.data[n * step[0][0] + c * step[0][1] + h * step[0][2] + w * step[0][3]] +
                           b.data[n * step[1][0] + c * step[1][1] + h * step[1][2] + w * step[1][3]];
                }
            }
        }
    }
}

OrtStatus *ORT_API_CALL run_conv(void *data, OrtKernelContext *context) {
    auto *kernel = static_cast<conv_kernel *>(data);
    const tensor &weights = kernel->weights;
    const int64_t *pads = kernel->pads, *strides = kernel->strides;
    tensor x, bias, add;
    TRY(read_input(context, 0, x));
    TRY(read_input(context, 2, bias));
    TRY(read_input(context, 3, add));
    if (x.rank != 4 || x.dims[1] != weights.dims[1]) return refuse("Conv: x is not (n, ci, h, w)");
    if (bias.data && (bias.rank != 1 || bias.dims[0] != weights.dims[0])) return refuse("Conv: bias is not (co)");
    tensor own = {nullptr, 4, {x.dims[0], weights.dims[0]}};  // the convolution alone
    for (int k = 0; k < 2; ++k) {
        own.dims[2 + k] = (x.dims[2 + k] + pads[k] + pads[2 + k] - weights.dims[2 + k]) / strides[k] + 1;
        if (x.dims[2 + k] + pads[k] + pads[2 + k] < weights.dims[2 + k])
            return refuse("Conv: x is smaller than the kernel");
    }
    conv_call call = {};
    call.shape = {(int)x.dims[0],   (int)x.dims[1],   (int)x.dims[2],       (int)x.dims[3],       (int)own.dims[1],
                  (int)own.dims[2], (int)own.dims[3], (int)weights.dims[2], (int)weights.dims[3], (int)strides[0],
                  (int)strides[1],  (int)pads[0],     (int)pads[1]};
    call.x = x.data, call.bias = bias.data;
    const bool empty = x.dims[0] * own.dims[2] * own.dims[3] == 0;
    if (!add.data) {
        TRY(make_output(context, own.dims, 4, call.y));
        return empty ? nullptr : convolve(kernel, context, call);
    }
    add = as_rank_4(add);
    int64_t dims[4];
    bool grows = false, fits = true;
    for (int k = 0; k < 4; ++k) {
        if (add.dims[k] != own.dims[k] && add.dims[k] != 1 && own.dims[k] != 1) return refuse("Conv: add does not fit");
        dims[k] = own.dims[k] == 1 ? add.dims[k] : own.dims[k];
        grows |= dims[k] != own.dims[k];
        fits &= add.dims[k] == own.dims[k];
    }
    float *y;
    TRY(make_output(context, dims, 4, y));
    if (empty || dims[0] == 0) return nullptr;
    if (!grows && (fits || add.dims[2] * add.dims[3] == 1)) {
        call.y = y, call.add = add.data, call.add_is_constant = !fits;
        strides_of(add, call.add_image_stride, call.add_channel_stride);
        return convolve(kernel, context, call);
    }
    scratch alone;  // a sum of other shapes
    TRY(alone.take(context, own.dims[0] * own.dims[1] * own.dims[2] * own.dims[3]));
    call.y = alone.data;
    own.data = alone.data;
    TRY(convolve(kernel, context, call));
    add_broadcast(own, add, dims, y);
    return nullptr;
}

// --- GroupNorm ---------------------------------------------------------------------------------------------------

struct norm_kernel {
    int64_t groups, silu;
    float epsilon;
};

OrtStatus *ORT_API_CALL make_norm(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *info, void **out) {
    norm_kernel made = {};
    TRY(api->KernelInfoGetAttribute_int64(info, "groups", &made.groups));
    TRY(api->KernelInfoGetAttribute_int64(info, "silu", &made.silu));
    TRY(api->KernelInfoGetAttribute_float(info, "epsilon", &made.epsilon));
    if (made.groups < 1) return refuse("GroupNorm: no groups");
    return keep(made, out);
}

// (c, 1 ...), no more dimensions than x has without its first.
bool is_of_channels(const tensor &t, const tensor &x) {
    if (t.rank < 1 || t.rank + 1 > x.rank || t.dims[0] != x.dims[1]) return false;
    for (size_t k = 1; k < t.rank; ++k) {
        if (t.dims[k] != 1) return false;
    }
    return true;
}

// (n or 1, c or 1, 1, 1)
bool is_of_pictures(const tensor &t, const tensor &x) {
    return x.rank == 4 && t.rank == 4 && (t.dims[0] == x.dims[0] || t.dims[0] == 1) &&
           (t.dims[1] == x.dims[1] || t.dims[1] == 1) && t.dims[2] == 1 && t.dims[3] == 1;
}

OrtStatus *ORT_API_CALL run_norm(void *data, OrtKernelContext *context) {
    const auto *kernel = static_cast<const norm_kernel *>(data);
    tensor x, scale, shift, modulation_scale, modulation_shift;
    TRY(read_input(context, 0, x));
    TRY(read_input(context, 1, scale));
    TRY(read_input(context, 2, shift));
    TRY(read_input(context, 3, modulation_scale));
    TRY(read_input(context, 4, modulation_shift));
    if (x.rank < 3 || x.dims[1] % kernel->groups) return refuse("GroupNorm: x does not divide into the groups");
    if (!is_of_channels(scale, x) || !is_of_channels(shift, x))
        return refuse("GroupNorm: scale and shift are not (c, 1 ...)");
    norm_call call = {};
    if (modulation_scale.data) {
        if (!modulation_shift.data || !is_of_pictures(modulation_scale, x) || !is_of_pictures(modulation_shift, x)) {
            return refuse("GroupNorm: modulation_scale and modulation_shift are not (n, c, 1, 1)");
        }
        strides_of(modulation_scale, call.scale_image_stride, call.scale_channel_stride);
        strides_of(modulation_shift, call.shift_image_stride, call.shift_channel_stride);
    }
    TRY(make_output(context, x.dims, x.rank, call.y));
    call.x = x.data, call.scale = scale.data, call.shift = shift.data;
    call.modulation_scale = modulation_scale.data, call.modulation_shift = modulation_shift.data;
    call.plane = x.rank == 4 ? x.dims[2] * x.dims[3] : x.dims[2];
    call.channels = (int)x.dims[1], call.groups = (int)kernel->groups;
    call.epsilon = kernel->epsilon, call.silu = kernel->silu != 0;
    if (call.plane == 0) return nullptr;
    const size_t groups = x.dims[0] * kernel->groups, pieces = groups < 4 * (size_t)threads ? groups : 4 * threads;
    return parallel_for(context, pieces, [&](size_t piece, size_t) {
        for (size_t n = groups * piece / pieces; n < groups * (piece + 1) / pieces; ++n) best->normalize(call, n);
    });
}

// --- Attention ---------------------------------------------------------------------------------------------------

struct attention_kernel {
    int64_t keys_are_rows, values_are_rows, heads_inside, heads;
    float scale;
};

OrtStatus *ORT_API_CALL make_attention(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *info, void **out) {
    attention_kernel made = {};
    TRY(api->KernelInfoGetAttribute_int64(info, "keys_are_rows", &made.keys_are_rows));
    TRY(api->KernelInfoGetAttribute_int64(info, "values_are_rows", &made.values_are_rows));
    TRY(api->KernelInfoGetAttribute_int64(info, "heads_inside", &made.heads_inside));
    TRY(api->KernelInfoGetAttribute_float(info, "scale", &made.scale));
    TRY(api->KernelInfoGetAttribute_int64(info, "heads", &made.heads));
    if (made.heads < 0) return refuse("Attention: heads are negative");
    if (made.heads && made.heads_inside) return refuse("Attention: heads and heads_inside exclude each other");
    if ((made.heads_inside || made.heads) && !(made.keys_are_rows && made.values_are_rows))
        return refuse("Attention: heads and heads_inside want keys and values that are rows");
    return keep(made, out);
}

// (pictures, heads, rows, columns) of q, k, v or y, and where each lies.
struct heads {
    size_t pictures = 1, size[3];  // heads, rows, columns
    head_strides strides;

    heads(const tensor &t, int64_t of_channels) {  // (n, heads · columns, rows ...)
        pictures = t.dims[0], size[0] = of_channels, size[1] = 1, size[2] = t.dims[1] / of_channels;
        for (size_t k = 2; k < t.rank; ++k) size[1] *= t.dims[k];
        strides = {t.dims[1] * size[1], size[2] * size[1], 1, size[1]};
    }

    heads(const tensor &t, bool inside, bool are_rows) {
        const tensor all = as_rank_4(t);
        const int64_t *d = all.dims;
        if (inside) {  // (n, rows, heads, columns)
            pictures = d[0], size[0] = d[2], size[1] = d[1], size[2] = d[3];
            strides = {size[0] * size[1] * size[2], size[2], size[0] * size[2], 1};
        } else {  // (..., rows, columns), or the other way round
            size[0] = d[0] * d[1], size[1] = d[are_rows ? 2 : 3], size[2] = d[are_rows ? 3 : 2];
            strides = {0, size[1] * size[2], are_rows ? size[2] : 1, are_rows ? 1 : size[1]};
        }
    }
};

OrtStatus *ORT_API_CALL run_attention(void *data, OrtKernelContext *context) {
    const auto *kernel = static_cast<const attention_kernel *>(data);
    tensor inputs[3];
    attention_call call = {};
    call.scale = kernel->scale;
    for (int n = 0; n < 3; ++n) TRY(read_input(context, n, inputs[n]));
    for (int n = 3; n < 5; ++n) {
        tensor factor;
        TRY(read_input(context, n, factor));
        if (!factor.data) continue;
        for (size_t k = 0; k < factor.rank; ++k) {
            if (factor.dims[k] != 1) return refuse("Attention: a factor is not one number");
        }
        call.scale *= *factor.data;
    }
    const tensor &q = inputs[0], &k = inputs[1], &v = inputs[2];
    const bool inside = kernel->heads_inside;
    const int64_t of_channels = kernel->heads;
    bool fits = q.rank >= 2 && k.rank == q.rank && v.rank == q.rank && (q.rank == 4 || !inside);
    if (of_channels) {
        fits = fits && q.rank >= 3;
        for (const tensor &t : inputs) fits = fits && t.dims[0] == q.dims[0] && t.dims[1] % of_channels == 0;
    }
    for (size_t n = 0; fits && !of_channels && n + 2 < q.rank; ++n) {
        fits = (inside && n == 1) || (k.dims[n] == q.dims[n] && v.dims[n] == q.dims[n]);
    }
    if (!fits) return refuse("Attention: q, k and v differ in dimensions");
    const auto split = [&](const tensor &t, bool are_rows) {
        return of_channels ? heads(t, of_channels) : heads(t, inside, are_rows);
    };
    const heads of_q = split(q, true), of_k = split(k, kernel->keys_are_rows), of_v = split(v, kernel->values_are_rows);
    fits = of_k.size[0] == of_q.size[0] && of_v.size[0] == of_q.size[0] && of_k.size[2] == of_q.size[2];
    if (!fits || of_k.size[1] != of_v.size[1] || of_k.size[1] == 0) return refuse("Attention: k and v do not fit q");
    call.q = q.data, call.k = k.data, call.v = v.data;
    call.of_q = of_q.strides, call.of_k = of_k.strides, call.of_v = of_v.strides;
    call.pictures = (int)of_q.pictures, call.heads = (int)of_q.size[0];
    call.queries = (int)of_q.size[1], call.depth = (int)of_q.size[2];
    call.keys = (int)of_k.size[1], call.values = (int)of_v.size[2];
    tensor y = q;
    y.dims[of_channels ? 1 : y.rank - 1] = of_channels ? of_channels * call.values : call.values;
    call.of_y = split(y, true).strides;
    TRY(make_output(context, y.dims, y.rank, call.y));
    const attention_layout l = best->lay_out_attention(call);
    const size_t all = (size_t)call.pictures * call.heads;
    scratch memory;
    TRY(memory.take(context, all * l.head_floats + threads * l.block_floats));
    TRY(parallel_for(context, all, [&](size_t head, size_t) {
        best->pack_head(call, l, (int)head, memory.data + head * l.head_floats);
    }));
    float *own = memory.data + all * l.head_floats;
    return parallel_for(context, all * l.blocks, [&](size_t unit, size_t worker) {
        const size_t head = unit / l.blocks;
        const float *packed = memory.data + head * l.head_floats;
        best->attend(call, l, (int)head, (int)(unit % l.blocks), packed, own + worker * l.block_floats);
    });
}

// --- what ONNX Runtime is told ------------------------------------------------------------------------------------

template <size_t NEEDED, size_t ALL>
OrtCustomOp describe(const char *(ORT_API_CALL *name)(const OrtCustomOp *), decltype(OrtCustomOp::CreateKernelV2) make,
                     decltype(OrtCustomOp::KernelComputeV2) run, decltype(OrtCustomOp::KernelDestroy) drop) {
    OrtCustomOp op = {};
    op.version = API;
    op.GetName = name;
    op.GetExecutionProviderType = [](const OrtCustomOp *) -> const char * { return nullptr; };  // the CPU
    op.GetInputTypeCount = [](const OrtCustomOp *) { return ALL; };
    op.GetInputType = [](const OrtCustomOp *, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t index) {
        return index < NEEDED ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return OrtMemTypeDefault; };
    op.GetOutputTypeCount = [](const OrtCustomOp *) -> size_t { return 1; };
    op.GetOutputType = [](const OrtCustomOp *, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return INPUT_OUTPUT_REQUIRED; };
    op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp *) { return 0; };
    op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp *) { return 0; };
    op.GetStartVersion = op.GetEndVersion = [](const OrtCustomOp *) { return 1; };
    op.CreateKernelV2 = make;
    op.KernelComputeV2 = run;
    op.KernelDestroy = drop;
    return op;
}

const OrtCustomOp conv = describe<2, 4>([](const OrtCustomOp *) { return "Conv"; }, make_conv, run_conv, drop_conv);
const OrtCustomOp norm = describe<3, 5>([](const OrtCustomOp *) { return "GroupNorm"; }, make_norm, run_norm, free);
const OrtCustomOp attention =
    describe<3, 5>([](const OrtCustomOp *) { return "Attention"; }, make_attention, run_attention, free);

OrtCustomOpDomain *domain;  // with `api` and `threads`, once all of it is there

OrtStatus *make_domain(const OrtApi *found) {
    OrtCustomOpDomain *made;
    TRY(found->CreateCustomOpDomain("sdedit", &made));
    for (const OrtCustomOp *op : {&conv, &norm, &attention}) {
        if (OrtStatus *status = found->CustomOpDomain_Add(made, op)) {
            found->ReleaseCustomOpDomain(made);
            return status;
        }
    }
    cpu_set_t usable;
    const bool known = sched_getaffinity(0, sizeof usable, &usable) == 0;  // not of more than 1024 processors
    threads = known ? CPU_COUNT(&usable) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    api = found;
    domain = made;
    return nullptr;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Has sessions that are opened from now on use the best vector unit that this processor has, of number `most` at most.
// Which: 6 and 5 are x86-64-v4 with AVX512-FP16 and AVX512-BF16, 4 and 3 are x86-64-v4 and v3, 0 is none.
EXPORT int sdedit_use_vector_unit(int most) {
    __builtin_cpu_init();
    int unit = 0;
    if (most >= 3 && __builtin_cpu_supports("x86-64-v3")) unit = 3;
    if (most >= 4 && __builtin_cpu_supports("x86-64-v4")) unit = 4;
    if (most >= 5 && unit == 4 && __builtin_cpu_supports("avx512bf16")) unit = 5;
    if (most >= 6 && unit >= 4 && __builtin_cpu_supports("avx512fp16")) unit = 6;
    constexpr const kernels *UNITS[] = {nullptr,     nullptr,       nullptr,      &kernels_v3,
                                        &kernels_v4, &kernels_bf16, &kernels_fp16};
    best = UNITS[unit];
    return unit;
}

// For SessionOptions. The library is not unloaded (-z nodelete), and the operators stay as long as the process lives.
EXPORT OrtStatus *ORT_API_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    const OrtApi *found = base->GetApi(API);
    if (!found) return base->GetApi(1)->CreateStatus(ORT_FAIL, "sdedit's operators need ONNX Runtime 1.20 or later");
    OrtStatus *status = nullptr;
    pthread_mutex_lock(&mutex);
    if (!best && !sdedit_use_vector_unit(BEST_UNIT)) {
        status = found->CreateStatus(ORT_FAIL, "sdedit's operators need a processor with AVX2");
    } else if (!domain) {
        status = make_domain(found);
    } else if (found != api) {
        status = found->CreateStatus(ORT_FAIL, "another ONNX Runtime in this process has sdedit's operators");
    }
    pthread_mutex_unlock(&mutex);
    return status ? status : found->AddCustomOpDomain(options, domain);
}
