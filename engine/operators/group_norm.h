// Group normalisation with what follows it: a factor and a summand for every channel, and SiLU.

inline float sum_of(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += v[i];
    return sum;
}

inline vec silu(vec x) { return x * reciprocal(exponential(-x) + 1.0f); }

// One group of one picture: (channels, plane) -> the same.
inline void normalize(const norm_call &call, int64_t unit) {
    const int image = (int)(unit / call.groups), group = (int)(unit % call.groups);
    const int channels = call.channels / call.groups, first = group * channels;
    const int64_t count = channels * call.plane, whole = count - count % LANES;
    const float *x = call.x + ((size_t)image * call.channels + first) * call.plane;
    float *y = call.y + ((size_t)image * call.channels + first) * call.plane;
    constexpr int64_t PIECE = 4096;  // summed in float, the sums in double
    double total = 0;
    for (int64_t at = 0; at < whole; at += PIECE) {
        const int64_t end = at + PIECE < whole ? at + PIECE : whole;
        vec sums = {};
        for (int64_t i = at; i < end; i += LANES) sums += load(x + i);
        total += sum_of(sums);
    }
    for (int64_t i = whole; i < count; ++i) total += x[i];
    const float mean = (float)(total / count);
    double squares = 0;
    for (int64_t at = 0; at < whole; at += PIECE) {
        const int64_t end = at + PIECE < whole ? at + PIECE : whole;
        vec sums = {};
        for (int64_t i = at; i < end; i += LANES) {
            const vec d = load(x + i) - mean;
            sums += d * d;
        }
        squares += sum_of(sums);
    }
    for (int64_t i = whole; i < count; ++i) squares += (double)(x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / __builtin_sqrtf((float)(squares / count) + call.epsilon);
    for (int c = 0; c < channels; ++c, x += call.plane, y += call.plane) {
        float scale = inverse * call.scale[first + c], shift = call.shift[first + c];
        if (call.modulation_scale) {
            const float then =
                call.modulation_scale[image * call.scale_image_stride + (first + c) * call.scale_channel_stride];
            scale *= then;
            shift = shift * then +
                    call.modulation_shift[image * call.shift_image_stride + (first + c) * call.shift_channel_stride];
        }
        int64_t i = 0;
        if (call.silu) {
            for (; i + LANES <= call.plane; i += LANES) {
                __builtin_prefetch(x + i + count);
                store(y + i, silu((load(x + i) - mean) * scale + shift));
            }
            if (i < call.plane) {
                float rest[LANES] = {};
                for (int64_t j = i; j < call.plane; ++j) rest[j - i] = x[j];
                store(rest, silu((load(rest) - mean) * scale + shift));
                for (int64_t j = i; j < call.plane; ++j) y[j] = rest[j - i];
            }
        } else {
            for (; i < call.plane; ++i) y[i] = (x[i] - mean) * scale + shift;
        }
    }
}
