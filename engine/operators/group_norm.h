// Group normalisation with what follows it: a factor and a summand for every channel, and SiLU.

inline float sum_of(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += v[i];
    return sum;
}

// e^x to 1e-7, for x in [-87, 88], beyond which it stays what it is there.
inline vec exponential(vec x) {
    constexpr float LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, ROUND = 12582912.0f;
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const vec shifted = x * LOG2_E + ROUND, n = shifted - ROUND;
    const vec r = x - n * LN2_HIGH - n * LN2_LOW;
    vec p = all(1.9875691500e-4f);  // Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((ivec)shifted << 23) + (127 << 23));
}

inline vec silu(vec x) { return x / (exponential(-x) + 1.0f); }

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
            for (; i + LANES <= call.plane; i += LANES) store(y + i, silu((load(x + i) - mean) * scale + shift));
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
