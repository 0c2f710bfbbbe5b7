// 2-D convolution of NCHW pictures, as products of packed matrices.
//
// Winograd's F(4x4, 3x3) where it pays (Lavin and Gray 2016, arXiv:1509.09308, section 4.3): a tile of 4 x 4 outputs is
// made of 36 products a channel instead of 144. Else im2col and one matrix product.
// A column of the matrices is a tile (Winograd) or a pixel of the output; a row is a channel of the output.
// The sizes here were tuned on two cores of a Xeon with AVX-512 (2 MB of L2) with the networks of the README.

constexpr int MAX_VECTORS = 2, MAX_BLOCKS = 8;
constexpr int TILE = 4, WINDOW = 6, PANELS = WINDOW * WINDOW;
constexpr int MIN_CHANNELS = 8;              // with fewer, the transforms cost more than they spare
constexpr int64_t CACHE_FLOATS = 256 << 10;  // of L2, for packed inputs
constexpr int CHANNELS_AHEAD = 2;            // of the input, that are fetched before they are needed
constexpr int64_t SMALL_FLOATS = 2 << 20;    // weights that are not worth sparing

// The points of the interpolation are 0, +-NEAR, +-FAR and infinity. Of 128 channels of normal numbers the result is
// off by 1.1e-6 (root mean square) with these, and by 2.2e-6 with the usual 0, +-1, +-2: both against float64.
constexpr double NEAR = 0.70710678118654752440, FAR = 1.41421356237309504880;
constexpr double NEAR2 = NEAR * NEAR, FAR2 = FAR * FAR;

// B' d
inline void transform_input(const vec d[WINDOW], vec out[WINDOW]) {
    constexpr float near = NEAR, far = FAR, near2 = NEAR2, far2 = FAR2, product = NEAR2 * FAR2, sum = NEAR2 + FAR2;
    const vec even_far = d[4] - far2 * d[2], odd_far = near * (d[3] - far2 * d[1]);
    const vec even_near = d[4] - near2 * d[2], odd_near = far * (d[3] - near2 * d[1]);
    out[0] = product * d[0] - sum * d[2] + d[4];
    out[1] = even_far + odd_far;
    out[2] = even_far - odd_far;
    out[3] = even_near + odd_near;
    out[4] = even_near - odd_near;
    out[5] = product * d[1] - sum * d[3] + d[5];
}

// A' m
inline void transform_output(const vec m[WINDOW], vec out[TILE]) {
    constexpr float near = NEAR, far = FAR, near2 = NEAR2, far2 = FAR2, near3 = NEAR2 * NEAR, far3 = FAR2 * FAR;
    const vec even_near = m[1] + m[2], odd_near = m[1] - m[2], even_far = m[3] + m[4], odd_far = m[3] - m[4];
    out[0] = m[0] + even_near + even_far;
    out[1] = near * odd_near + far * odd_far;
    out[2] = near2 * even_near + far2 * even_far;
    out[3] = near3 * odd_near + far3 * odd_far + m[5];
}

// G g, of ROWS kernels at once: the taps of g lie g_step rows of ROWS numbers apart, the points of out out_step rows.
inline void transform_weights(const double *g, int g_step, double *out, int out_step) {
    constexpr double at_near = 1 / (2 * NEAR2 * (NEAR2 - FAR2)), at_far = 1 / (2 * FAR2 * (FAR2 - NEAR2));
    for (int r = 0; r < ROWS; ++r) {
        const double a = g[r], b = g[g_step * ROWS + r], c = g[2 * g_step * ROWS + r];
        out[r] = a / (NEAR2 * FAR2);
        out[out_step * ROWS + r] = (a + NEAR * b + NEAR2 * c) * at_near;
        out[2 * out_step * ROWS + r] = (a - NEAR * b + NEAR2 * c) * at_near;
        out[3 * out_step * ROWS + r] = (a + FAR * b + FAR2 * c) * at_far;
        out[4 * out_step * ROWS + r] = (a - FAR * b + FAR2 * c) * at_far;
        out[5 * out_step * ROWS + r] = c;
    }
}

inline int groups_of(const conv_shape &s) { return (s.co + ROWS - 1) / ROWS; }

inline int rows_of(const conv_shape &s, bool winograd) { return winograd ? s.ci : s.ci * s.kernel_h * s.kernel_w; }

// The largest power of two that is not above the largest size among one output channel's weights; 1 where that is none.
inline float power_below(const conv_shape &s, const conv_weights &w, int row) {
    float most = 0;
    for (int i = 0; i < s.ci; ++i) {
        for (int tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
            const float size = __builtin_fabsf(w.data[row * w.row + i * w.channel + tap]);
            most = size > most ? size : most;
        }
    }
    uint32_t power;
    memcpy(&power, &most, sizeof power);
    power &= 0x7f800000;  // its exponent alone
    memcpy(&most, &power, sizeof most);
    return most > 0 ? most : 1;
}

// Row k of packed weights. In halves it is the first of a pair, whose second is 0 until it comes, or that second.
inline void put_weights(float *panel, bool half, int k, const double *values) {
    float *row = panel + (size_t)(half ? k / 2 : k) * ROWS;
    float floats[LANES] = {};
    for (int r = 0; r < ROWS; ++r) floats[r] = (float)values[r];
    if (half && k % 2 == 0) store(floats, in_pairs(load(floats), vec{}));
    if (half && k % 2) {
        float first[LANES] = {};
        memcpy(first, row, sizeof(float[ROWS]));
        store(floats, (vec)((ivec)load(first) | (ivec)in_pairs(vec{}, load(floats))));
    }
    memcpy(row, floats, sizeof(float[ROWS]));
}

// One group of (co, ci, kh, kw) -> (groups, panels, depth, ROWS). In halves there follow factors (groups, ROWS), powers
// of two by which the weights were divided: the largest of a channel are near 1/16 then, so that small ones are no
// subnormal halves, and sums of products do not overflow.
inline void pack_weights(const conv_shape &s, const layout &l, const conv_weights &w, int group, float *packed) {
    const int taps = s.kernel_h * s.kernel_w;
    const int count = s.co - group * ROWS < ROWS ? s.co - group * ROWS : ROWS;
    const size_t panel = (size_t)l.depth * ROWS;
    float *to = packed + group * l.panels * panel;
    float divisors[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        divisors[r] = l.half && r < count ? 16 * power_below(s, w, group * ROWS + r) : 1;
    }
    if (l.half) memcpy(packed + l.groups * l.panels * panel + group * ROWS, divisors, sizeof divisors);
    for (int i = 0; i < s.ci; ++i) {
        const auto weight = [&](int r, int tap) -> double {
            return r < count ? w.data[(group * ROWS + r) * w.row + i * w.channel + tap] / divisors[r] : 0;
        };
        if (!l.winograd) {
            for (int k = 0; k < taps; ++k) {
                double values[ROWS];
                for (int r = 0; r < ROWS; ++r) values[r] = weight(r, k);
                put_weights(to, l.half, i * taps + k, values);
            }
            continue;
        }
        double g[9 * ROWS], lines[3 * WINDOW * ROWS], whole[PANELS * ROWS];
        for (int k = 0; k < 9; ++k) {
            for (int r = 0; r < ROWS; ++r) g[k * ROWS + r] = weight(r, k);
        }
        for (int y = 0; y < 3; ++y) transform_weights(g + 3 * y * ROWS, 1, lines + y * WINDOW * ROWS, 1);
        for (int x = 0; x < WINDOW; ++x) transform_weights(lines + x * ROWS, WINDOW, whole + x * ROWS, WINDOW);
        for (int p = 0; p < PANELS; ++p) put_weights(to + p * panel, l.half, i, whole + p * ROWS);
    }
}

inline layout lay_out(const conv_shape &s, bool half, int threads) {
    layout l = {};
    const int tiles = (s.w + TILE - 1) / TILE;
    l.run = LANES;
    while (l.run > 4 && tiles % l.run && tiles < 4 * l.run) l.run /= 2;
    l.tiles_x = (tiles + l.run - 1) / l.run * l.run;
    l.tiles_y = (s.h + TILE - 1) / TILE;
    // Of few tiles the products cost less than reading weights that are four times as many. Those of one picture count,
    // so that it has the same bits in every batch.
    const int64_t tiles_each = (int64_t)l.tiles_x * l.tiles_y, all_tiles = s.n * tiles_each;
    const int64_t transformed = (int64_t)PANELS * groups_of(s) * ROWS * s.ci;  // floats of the weights
    const bool many = tiles_each >= 2 * LANES || (tiles_each >= LANES && transformed <= SMALL_FLOATS);
    l.winograd = s.kernel_h == 3 && s.kernel_w == 3 && s.stride_y == 1 && s.stride_x == 1 && s.pad_y == 1 &&
                 s.pad_x == 1 && s.out_h == s.h && s.out_w == s.w && s.ci >= MIN_CHANNELS && many;
    l.half = half;
    l.columns = l.winograd ? all_tiles : (int64_t)s.n * s.out_h * s.out_w;
    l.vectors = l.columns > LANES ? MAX_VECTORS : 1;
    l.width = l.vectors * LANES;
    l.all_blocks = (int)((l.columns + l.width - 1) / l.width);
    l.groups = groups_of(s);
    l.depth = l.half ? (rows_of(s, l.winograd) + 1) / 2 : rows_of(s, l.winograd);
    l.panels = l.winograd ? PANELS : 1;
    l.panel_floats = (size_t)l.depth * l.width + LANES;  // one vector more: of a power of two, all share a cache set
    l.block_floats = l.panels * l.panel_floats;
    l.weight_floats = (size_t)l.groups * ROWS * (l.panels * l.depth + (l.half ? 1 : 0));
    const int64_t room = CACHE_FLOATS / (int64_t)l.block_floats, share = l.all_blocks / (2 * threads);
    const int64_t most = room < share ? room : share;
    l.blocks = most < 1 ? 1 : most > MAX_BLOCKS ? MAX_BLOCKS : (int)most;
    l.units = (l.all_blocks + l.blocks - 1) / l.blocks;
    const bool fit = l.all_blocks * (int64_t)l.block_floats <= CACHE_FLOATS;
    l.at_once = fit || (l.units < 4 * threads && l.units % threads);
    return l;
}

// Columns of LANES tiles that lie side by side in four vectors p, four floats each: s[j] = p[j], p[4 + j], p[8 + j] ...
inline void take_columns(const vec p[TILE], vec s[TILE]) {
    ivec even, odd;
    for (int i = 0; i < LANES; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const vec ab_even = __builtin_shuffle(p[0], p[1], even), ab_odd = __builtin_shuffle(p[0], p[1], odd);
    const vec cd_even = __builtin_shuffle(p[2], p[3], even), cd_odd = __builtin_shuffle(p[2], p[3], odd);
    s[0] = __builtin_shuffle(ab_even, cd_even, even);
    s[1] = __builtin_shuffle(ab_odd, cd_odd, even);
    s[2] = __builtin_shuffle(ab_even, cd_even, odd);
    s[3] = __builtin_shuffle(ab_odd, cd_odd, odd);
}

// The inverse: p = s[0][0], s[1][0], s[2][0], s[3][0], s[0][1] ...
inline void put_columns(float *p, const vec s[TILE]) {
    ivec low, high;
    for (int i = 0; i < LANES; ++i) low[i] = i / 2 + i % 2 * LANES, high[i] = LANES / 2 + low[i];
    const vec even_low = __builtin_shuffle(s[0], s[2], low), even_high = __builtin_shuffle(s[0], s[2], high);
    const vec odd_low = __builtin_shuffle(s[1], s[3], low), odd_high = __builtin_shuffle(s[1], s[3], high);
    store(p, __builtin_shuffle(even_low, odd_low, low));
    store(p + LANES, __builtin_shuffle(even_low, odd_low, high));
    store(p + 2 * LANES, __builtin_shuffle(even_high, odd_high, low));
    store(p + 3 * LANES, __builtin_shuffle(even_high, odd_high, high));
}

// Where a run of tiles begins: of which picture, and its first output.
struct place {
    int image, top, left;
};

inline place place_of(const layout &l, int64_t tile) {
    const int64_t of_image = (int64_t)l.tiles_x * l.tiles_y;
    return {(int)(tile / of_image), (int)(tile % of_image / l.tiles_x) * TILE, (int)(tile % l.tiles_x) * TILE};
}

// to = `count` floats of a line of `width` from `left` on; outside of it lie zeros.
inline void copy_line(float *to, const float *line, int left, int count, int width) {
    int k = left >= 0 ? 0 : -left < count ? -left : count;
    const int end = width - left < count ? width - left : count;
    for (int j = 0; j < k; ++j) to[j] = 0;
    for (; k + LANES <= end; k += LANES) store(to + k, load(line + left + k));
    for (; k < end; ++k) to[k] = line[left + k];
    for (; k < count; ++k) to[k] = 0;
}

// A line through the windows of one vector of tiles, as its six columns. x: the channel in picture 0.
template <int RUN_OF_TILES>
inline void take_line(const conv_shape &s, const float *x, const place *at, int row, vec out[WINDOW]) {
    constexpr int SPAN = TILE * RUN_OF_TILES, PARTS = SPAN / LANES;
    const size_t image = (size_t)s.ci * s.h * s.w;
    ivec lane, next;
    for (int i = 0; i < LANES; ++i) lane[i] = i, next[i] = i + 1;
    vec parts[TILE], ends[2] = {};  // ends: the two pixels behind each run
#pragma GCC unroll 4
    for (int run = 0; run < LANES / RUN_OF_TILES; ++run) {
        vec *part = parts + PARTS * run;
        const int y = at[run].top - 1 + row, left = at[run].left - 1;
        if (at[run].image < 0 || y < 0 || y >= s.h) {
#pragma GCC unroll 4
            for (int k = 0; k < PARTS; ++k) part[k] = vec{};
            continue;
        }
        float copy[SPAN + 2];
        const float *from = x + at[run].image * image + (size_t)y * s.w + left;
#pragma GCC unroll 4
        for (int k = 0; k < SPAN; k += 16) __builtin_prefetch(from + (size_t)CHANNELS_AHEAD * s.h * s.w + k);
        const bool inside = left + SPAN < s.w;  // but for what is before it, and one pixel behind it
        if (!inside) {
            copy_line(copy, from - left, left, SPAN + 2, s.w);
            from = copy;
        }
        part[0] = inside && left < 0 ? __builtin_shuffle(vec{}, load(from + 1), lane + (LANES - 1)) : load(from);
#pragma GCC unroll 4
        for (int k = 1; k < PARTS; ++k) part[k] = load(from + k * LANES);
        const ivec last = lane == RUN_OF_TILES * (run + 1) - 1;
        ends[0] = last ? all(from[SPAN]) : ends[0];
        ends[1] = last ? all(inside && left + SPAN + 1 == s.w ? 0 : from[SPAN + 1]) : ends[1];
    }
    take_columns(parts, out);
    const ivec is_end = (lane & (RUN_OF_TILES - 1)) == RUN_OF_TILES - 1;
    out[4] = is_end ? ends[0] : __builtin_shuffle(out[0], next);
    out[5] = is_end ? ends[1] : __builtin_shuffle(out[1], next);
}

// The windows of one vector of tiles in a channel, transformed: vectors that lie `step` apart from `to` on.
template <int RUN_OF_TILES>
void transform_windows(const conv_shape &s, const float *x, const place *at, float *to, size_t step) {
    vec lines[WINDOW][WINDOW];
    for (int r = 0; r < WINDOW; ++r) {
        vec line[WINDOW];
        take_line<RUN_OF_TILES>(s, x, at, r, line);
        transform_input(line, lines[r]);
    }
    for (int c = 0; c < WINDOW; ++c) {
        vec column[WINDOW], both[WINDOW];
        for (int r = 0; r < WINDOW; ++r) column[r] = lines[r][c];
        transform_input(column, both);
        for (int r = 0; r < WINDOW; ++r) store(to + (r * WINDOW + c) * step, both[r]);
    }
}

// Channels [from, to) of `count` vectors of tiles.
inline void pack_tiles(const conv_call &call, const layout &l, int64_t first, int count, int from, int to, float *v) {
    const conv_shape &s = call.shape;
    const size_t plane = (size_t)s.h * s.w;
    place places[MAX_BLOCKS * MAX_VECTORS][LANES / 4];
    for (int n = 0; n < count; ++n) {
        for (int k = 0; k < LANES / l.run; ++k) {
            const int64_t tile = first + n * LANES + k * l.run;
            places[n][k] = tile < l.columns ? place_of(l, tile) : place{-1, 0, 0};
        }
    }
    const auto transform = l.run == LANES ? transform_windows<LANES>
                           : l.run == 8   ? transform_windows<8>
                                          : transform_windows<4>;
    for (int i = from; i < to; i += l.half ? 2 : 1) {
        const float *x = call.x + i * plane;
        for (int n = 0; n < count; ++n) {
            const size_t row = l.half ? i / 2 : i;
            float *out = v + n / l.vectors * l.block_floats + row * l.width + n % l.vectors * LANES;
            if (!l.half) {
                transform(s, x, places[n], out, l.panel_floats);
                continue;
            }
            float both[2][PANELS * LANES];
            transform(s, x, places[n], both[0], LANES);
            if (i + 1 < s.ci) transform(s, x + plane, places[n], both[1], LANES);
            else memset(both[1], 0, sizeof both[1]);
            for (int p = 0; p < PANELS; ++p) {
                store(out + p * l.panel_floats, in_pairs(load(both[0] + p * LANES), load(both[1] + p * LANES)));
            }
        }
    }
}

// Channels [from, to) of what `count` output pixels are made of.
inline void pack_pixels(const conv_call &call, const layout &l, int64_t first, int count, int from, int to, float *v) {
    const conv_shape &s = call.shape;
    const int taps = s.kernel_h * s.kernel_w;
    const int64_t plane = (int64_t)s.out_h * s.out_w;
    struct {
        int image, y, x, count, at;              // at: of the columns here
    } pieces[MAX_BLOCKS * MAX_VECTORS * LANES];  // of one line and one block
    int size = 0;
    for (int at = 0; at < count; at += pieces[size++].count) {
        const int64_t pixel = first + at;
        const int room = l.width - at % l.width;
        if (pixel >= l.columns) {
            pieces[size] = {-1, 0, 0, room, at};
            continue;
        }
        const int rest = s.out_w - (int)(pixel % s.out_w);
        pieces[size] = {(int)(pixel / plane), (int)(pixel % plane / s.out_w) * s.stride_y - s.pad_y,
                        (int)(pixel % s.out_w) * s.stride_x - s.pad_x, rest < room ? rest : room, at};
    }
    const auto column = [&](int at) { return v + at / l.width * l.block_floats + at % l.width; };
    float pairs[2][MAX_BLOCKS * MAX_VECTORS * LANES];  // of rows, in halves
    for (int k = from * taps; k < to * taps; ++k) {
        const int i = k / taps, ky = k % taps / s.kernel_w, kx = k % s.kernel_w;
        for (int n = 0; n < size; ++n) {
            const auto &piece = pieces[n];
            float *out = l.half ? pairs[k % 2] + piece.at : column(piece.at) + (size_t)k * l.width;
            const int y = piece.y + ky, left = piece.x + kx;
            if (piece.image < 0 || y < 0 || y >= s.h) {
                for (int j = 0; j < piece.count; ++j) out[j] = 0;
                continue;
            }
            const float *line = call.x + (((size_t)piece.image * s.ci + i) * s.h + y) * s.w;
            if (s.stride_x == 1) {
                for (int j = 0; ky == 0 && kx == 0 && j < piece.count; j += 16) {
                    __builtin_prefetch(line + left + j + (size_t)CHANNELS_AHEAD * s.h * s.w);
                }
                copy_line(out, line, left, piece.count, s.w);
                continue;
            }
            for (int j = 0; j < piece.count; ++j) {
                const int x = left + j * s.stride_x;
                out[j] = x >= 0 && x < s.w ? line[x] : 0;
            }
        }
        const bool alone = k % 2 == 0 && k + 1 == s.ci * taps;
        for (int at = 0; l.half && (k % 2 || alone) && at < count; at += LANES) {
            const vec second = alone ? vec{} : load(pairs[1] + at);
            store(column(at) + (size_t)(k / 2) * l.width, in_pairs(load(pairs[0] + at), second));
        }
    }
}

// Channels [from, to) of `count` blocks from `block` on, to v (count, panels, depth, width).
inline void pack(const conv_call &call, const layout &l, int block, int count, int from, int to, float *v) {
    const int64_t first = (int64_t)block * l.width;
    if (l.winograd) pack_tiles(call, l, first, count * l.vectors, from, to, v);
    else pack_pixels(call, l, first, count * l.width, from, to, v);
}

// What is added to every pixel of a channel.
inline float constant_of(const conv_call &call, int image, int channel) {
    const float bias = call.bias ? call.bias[channel] : 0;
    if (!call.add || !call.add_is_constant) return bias;
    return bias + call.add[image * call.add_image_stride + channel * call.add_channel_stride];
}

// The factor of a channel's weights.
inline float factor_of(const conv_call &call, const layout &l, int channel) {
    return l.half ? call.packed[l.weight_floats - (size_t)l.groups * ROWS + channel] : 1;
}

// y = factor * sums + constant + add. `ahead`: how far from `add` lies what is added next.
inline void put_line(float *y, const float *sums, float factor, float constant, const float *add, size_t ahead,
                     int count) {
    int k = 0;
    if (add) {
        for (; k + LANES <= count; k += LANES) {
            __builtin_prefetch(add + k + ahead);
            store(y + k, load(sums + k) * factor + constant + load(add + k));
        }
        for (; k < count; ++k) y[k] = sums[k] * factor + constant + add[k];
    } else {
        for (; k + LANES <= count; k += LANES) store(y + k, load(sums + k) * factor + constant);
        for (; k < count; ++k) y[k] = sums[k] * factor + constant;
    }
}

// One vector of tiles: m (panels, ROWS, width) -> `count` channels of the output.
inline void finish_tiles(const conv_call &call, const layout &l, int64_t first, int channel, int count,
                         const float *m) {
    const conv_shape &s = call.shape;
    const size_t ahead = (size_t)CHANNELS_AHEAD * s.h * s.w;
    place places[LANES / 4];
    int runs = 0;
    for (int tile = 0; tile < LANES && first + tile < l.columns; tile += l.run)
        places[runs++] = place_of(l, first + tile);
    for (int o = 0; o < count; ++o, m += l.width) {
        const float factor = factor_of(call, l, channel + o);
        vec lines[TILE][WINDOW];
        for (int c = 0; c < WINDOW; ++c) {
            vec column[WINDOW], out[TILE];
            for (int r = 0; r < WINDOW; ++r) column[r] = load(m + (size_t)(r * WINDOW + c) * ROWS * l.width);
            transform_output(column, out);
            for (int r = 0; r < TILE; ++r) lines[r][c] = out[r];
        }
        float pixels[TILE][TILE * LANES];
        for (int r = 0; r < TILE; ++r) {
            vec out[TILE];
            transform_output(lines[r], out);
            put_columns(pixels[r], out);
        }
        for (int run = 0; run < runs; ++run) {
            const place at = places[run];
            const int width = s.w - at.left < TILE * l.run ? s.w - at.left : TILE * l.run;
            const size_t offset = (((size_t)at.image * s.co + channel + o) * s.h + at.top) * s.w + at.left;
            const float constant = constant_of(call, at.image, channel + o);
            for (int r = 0; r < TILE && at.top + r < s.h; ++r) {
                const size_t line = offset + (size_t)r * s.w;
                const float *add = call.add && !call.add_is_constant ? call.add + line : nullptr;
                put_line(call.y + line, pixels[r] + TILE * l.run * run, factor, constant, add, ahead, width);
            }
        }
    }
}

// m (ROWS, width) -> `count` channels of the output.
inline void finish_pixels(const conv_call &call, const layout &l, int64_t first, int channel, int count,
                          const float *m) {
    const conv_shape &s = call.shape;
    const int64_t plane = (int64_t)s.out_h * s.out_w;
    for (int at = 0; at < l.width && first + at < l.columns;) {
        const int image = (int)((first + at) / plane);
        const int64_t pixel = (first + at) % plane, rest = plane - pixel;
        const int pixels = l.width - at < rest ? l.width - at : (int)rest;
        for (int o = 0; o < count; ++o) {
            const size_t offset = ((size_t)image * s.co + channel + o) * plane + pixel;
            const float *add = call.add && !call.add_is_constant ? call.add + offset : nullptr;
            put_line(call.y + offset, m + (size_t)o * l.width + at, factor_of(call, l, channel + o),
                     constant_of(call, image, channel + o), add, CHANNELS_AHEAD * plane, pixels);
        }
        at += pixels;
    }
}

// One group of output channels in one block, whose inputs are packed at v.
inline void compute(const conv_call &call, const layout &l, int block, int group, const float *v) {
    alignas(64) float m[PANELS * ROWS * MAX_VECTORS * LANES];
    for (int p = 0; p < l.panels; ++p) {
        const float *u = call.packed + ((size_t)group * l.panels + p) * l.depth * ROWS;
        float *out = m + (size_t)p * ROWS * l.width;
        const float *x = v + p * l.panel_floats;
        if (l.half) {
            if (l.vectors == 1) multiply_halves<1>(u, x, l.depth, out);
            else multiply_halves<MAX_VECTORS>(u, x, l.depth, out);
        } else {
            if (l.vectors == 1) multiply<1>(u, x, l.depth, out);
            else multiply<MAX_VECTORS>(u, x, l.depth, out);
        }
    }
    const int channel = group * ROWS, count = call.shape.co - channel < ROWS ? call.shape.co - channel : ROWS;
    const int64_t first = (int64_t)block * l.width;
    if (!l.winograd) return finish_pixels(call, l, first, channel, count, m);
    for (int n = 0; n < l.vectors; ++n) finish_tiles(call, l, first + n * LANES, channel, count, m + n * LANES);
}
