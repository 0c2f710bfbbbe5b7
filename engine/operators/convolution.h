// 2-D convolution of NCHW pictures, as products of packed matrices.
//
// Winograd's F(4x4, 3x3) where it pays (Lavin and Gray 2016, arXiv:1509.09308, section 4.3): a tile of 4 x 4 outputs is
// made of 36 products a channel instead of 144. Else im2col and one matrix product.
// A column of the matrices is a tile (Winograd) or a pixel of the output; a row is a channel of the output.
// The sizes here were tuned on two cores of a Xeon with AVX-512 (2 MB of L2) with the networks of the README.

constexpr int ROWS = LANES == 16 ? 12 : 6;  // a group: with two vectors of columns, its sums stay in registers
constexpr int MAX_VECTORS = 2, MAX_BLOCKS = 8;
constexpr int TILE = 4, WINDOW = 6, PANELS = WINDOW * WINDOW;
constexpr int MIN_CHANNELS = 8;              // with fewer, the transforms cost more than they spare
constexpr int64_t CACHE_FLOATS = 256 << 10;  // of L2, for packed inputs
constexpr int AHEAD = 48;                    // rows of weights that are fetched before they are needed
constexpr size_t SMALL_FLOATS = 2 << 20;     // weights that are not worth sparing

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
inline int depth_of(const conv_shape &s, bool winograd) { return winograd ? s.ci : s.ci * s.kernel_h * s.kernel_w; }
inline size_t packed_floats(const conv_shape &s, bool winograd) {
    return (size_t)(winograd ? PANELS : 1) * groups_of(s) * ROWS * depth_of(s, winograd);
}

// One group of (co, ci, kh, kw) -> (groups, panels, depth, ROWS).
inline void pack_weights(const conv_shape &s, bool winograd, const float *weights, int group, float *packed) {
    const int depth = depth_of(s, winograd), taps = s.kernel_h * s.kernel_w;
    const int rows = s.co - group * ROWS < ROWS ? s.co - group * ROWS : ROWS;
    const size_t panel = (size_t)depth * ROWS;
    const float *from = weights + (size_t)group * ROWS * s.ci * taps;
    packed += (size_t)group * (winograd ? PANELS : 1) * panel;
    if (!winograd) {
        for (int k = 0; k < depth; ++k) {
            for (int r = 0; r < ROWS; ++r) packed[(size_t)k * ROWS + r] = r < rows ? from[(size_t)r * depth + k] : 0;
        }
        return;
    }
    for (int i = 0; i < s.ci; ++i) {
        double g[9 * ROWS] = {}, half[3 * WINDOW * ROWS], whole[PANELS * ROWS];
        for (int r = 0; r < rows; ++r) {
            for (int k = 0; k < 9; ++k) g[k * ROWS + r] = from[((size_t)r * s.ci + i) * 9 + k];
        }
        for (int y = 0; y < 3; ++y) transform_weights(g + 3 * y * ROWS, 1, half + y * WINDOW * ROWS, 1);
        for (int x = 0; x < WINDOW; ++x) transform_weights(half + x * ROWS, WINDOW, whole + x * ROWS, WINDOW);
        for (int p = 0; p < PANELS; ++p) {
            for (int r = 0; r < ROWS; ++r) packed[p * panel + (size_t)i * ROWS + r] = (float)whole[p * ROWS + r];
        }
    }
}

inline layout lay_out(const conv_shape &s, int threads) {
    layout l = {};
    const int tiles = (s.w + TILE - 1) / TILE;
    l.run = LANES;
    while (l.run > 4 && tiles % l.run && tiles < 4 * l.run) l.run /= 2;
    l.tiles_x = (tiles + l.run - 1) / l.run * l.run;
    l.tiles_y = (s.h + TILE - 1) / TILE;
    // Of few tiles the products cost less than reading weights that are four times as many. Those of one picture count,
    // so that it has the same bits in every batch.
    const int64_t tiles_each = (int64_t)l.tiles_x * l.tiles_y, all_tiles = s.n * tiles_each;
    const bool many = tiles_each >= 2 * LANES || (tiles_each >= LANES && packed_floats(s, true) <= SMALL_FLOATS);
    l.winograd = s.kernel_h == 3 && s.kernel_w == 3 && s.stride_y == 1 && s.stride_x == 1 && s.pad_y == 1 &&
                 s.pad_x == 1 && s.out_h == s.h && s.out_w == s.w && s.ci >= MIN_CHANNELS && many;
    l.columns = l.winograd ? all_tiles : (int64_t)s.n * s.out_h * s.out_w;
    l.vectors = l.columns > LANES ? MAX_VECTORS : 1;
    l.width = l.vectors * LANES;
    l.all_blocks = (int)((l.columns + l.width - 1) / l.width);
    l.groups = groups_of(s);
    l.depth = depth_of(s, l.winograd);
    l.panels = l.winograd ? PANELS : 1;
    l.panel_floats = (size_t)l.depth * l.width + LANES;  // one vector more: of a power of two, all share a cache set
    l.block_floats = l.panels * l.panel_floats;
    l.weight_floats = packed_floats(s, l.winograd);
    const int64_t room = CACHE_FLOATS / (int64_t)l.block_floats, share = l.all_blocks / (2 * threads);
    const int64_t most = room < share ? room : share;
    l.blocks = most < 1 ? 1 : most > MAX_BLOCKS ? MAX_BLOCKS : (int)most;
    l.units = (l.all_blocks + l.blocks - 1) / l.blocks;
    const bool fit = l.all_blocks * (int64_t)l.block_floats <= CACHE_FLOATS;
    l.at_once = fit || (l.units < 4 * threads && l.units % threads);
    return l;
}

// out (ROWS, N vectors) = u (depth, ROWS), transposed, times v (depth, N vectors).
template <int N>
inline void multiply(const float *u, const float *v, int depth, float *out) {
    vec sums[ROWS][N];
    for (int r = 0; r < ROWS; ++r) {
        for (int n = 0; n < N; ++n) sums[r][n] = vec{};
    }
    for (int k = 0; k < depth; ++k, u += ROWS, v += N * LANES) {
        vec x[N];
        __builtin_prefetch(u + AHEAD * ROWS);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) x[n] = load(v + n * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) sums[r][n] += u[r] * x[n];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(out + (r * N + n) * LANES, sums[r][n]);
    }
}

// Columns of LANES tiles that lie side by side in p, four floats each: s[j] = p[j], p[4 + j], p[8 + j] ...
inline void take_columns(const float *p, vec s[TILE]) {
    ivec even, odd;
    for (int i = 0; i < LANES; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const vec a = load(p), b = load(p + LANES), c = load(p + 2 * LANES), d = load(p + 3 * LANES);
    const vec ab_even = __builtin_shuffle(a, b, even), ab_odd = __builtin_shuffle(a, b, odd);
    const vec cd_even = __builtin_shuffle(c, d, even), cd_odd = __builtin_shuffle(c, d, odd);
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
    for (; k + 8 <= end; k += 8) memcpy(to + k, line + left + k, 8 * sizeof(float));
    for (; k < end; ++k) to[k] = line[left + k];
    for (; k < count; ++k) to[k] = 0;
}

// A line through the windows of one vector of tiles, as its six columns. x: the channel in picture 0.
inline void take_line(const conv_shape &s, const layout &l, const float *x, const place *at, int row, vec out[WINDOW]) {
    constexpr int SPAN = TILE * LANES;
    const size_t image = (size_t)s.ci * s.h * s.w;
    ivec next;
    for (int i = 0; i < LANES; ++i) next[i] = i + 1;
    const int y = at->top - 1 + row, left = at->left - 1;
    if (l.run == LANES && at->image >= 0 && y >= 0 && y < s.h && left >= 0 && left + SPAN + 2 <= s.w) {
        const float *p = x + at->image * image + (size_t)y * s.w + left;
        take_columns(p, out);
        out[4] = __builtin_shuffle(out[0], all(p[SPAN]), next);
        out[5] = __builtin_shuffle(out[1], all(p[SPAN + 1]), next);
        return;
    }
    float line[SPAN], ends[2][LANES] = {};
    ivec is_end = {};
    for (int tile = 0; tile < LANES; tile += l.run, ++at) {
        const int y = at->top - 1 + row, left = at->left - 1, span = TILE * l.run, last = tile + l.run - 1;
        is_end[last] = -1;
        if (at->image < 0 || y < 0 || y >= s.h) {
            memset(line + TILE * tile, 0, span * sizeof(float));
            continue;
        }
        const float *p = x + at->image * image + (size_t)y * s.w;
        copy_line(line + TILE * tile, p, left, span, s.w);
        if (left + span < s.w) ends[0][last] = p[left + span];
        if (left + span + 1 < s.w) ends[1][last] = p[left + span + 1];
    }
    take_columns(line, out);
    out[4] = is_end ? load(ends[0]) : __builtin_shuffle(out[0], next);
    out[5] = is_end ? load(ends[1]) : __builtin_shuffle(out[1], next);
}

// Channels [from, to) of `count` vectors of tiles.
inline void pack_tiles(const conv_call &call, const layout &l, int64_t first, int count, int from, int to, float *v) {
    const conv_shape &s = call.shape;
    place places[MAX_BLOCKS * MAX_VECTORS][LANES / 4];
    for (int n = 0; n < count; ++n) {
        for (int k = 0; k < LANES / l.run; ++k) {
            const int64_t tile = first + n * LANES + k * l.run;
            places[n][k] = tile < l.columns ? place_of(l, tile) : place{-1, 0, 0};
        }
    }
    for (int i = from; i < to; ++i) {
        const float *x = call.x + (size_t)i * s.h * s.w;
        for (int n = 0; n < count; ++n) {
            vec lines[WINDOW][WINDOW];
            for (int r = 0; r < WINDOW; ++r) {
                vec line[WINDOW];
                take_line(s, l, x, places[n], r, line);
                transform_input(line, lines[r]);
            }
            float *out = v + n / l.vectors * l.block_floats + (size_t)i * l.width + n % l.vectors * LANES;
            for (int c = 0; c < WINDOW; ++c) {
                vec column[WINDOW], both[WINDOW];
                for (int r = 0; r < WINDOW; ++r) column[r] = lines[r][c];
                transform_input(column, both);
                for (int r = 0; r < WINDOW; ++r) store(out + (r * WINDOW + c) * l.panel_floats, both[r]);
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
        int image, y, x, count;
        float *to;
    } pieces[MAX_BLOCKS * MAX_VECTORS * LANES];  // of one line and one block
    int size = 0;
    for (int at = 0; at < count; at += pieces[size++].count) {
        const int64_t pixel = first + at;
        const int room = l.width - at % l.width;
        float *out = v + at / l.width * l.block_floats + at % l.width;
        if (pixel >= l.columns) {
            pieces[size] = {-1, 0, 0, room, out};
            continue;
        }
        const int rest = s.out_w - (int)(pixel % s.out_w);
        pieces[size] = {(int)(pixel / plane), (int)(pixel % plane / s.out_w) * s.stride_y - s.pad_y,
                        (int)(pixel % s.out_w) * s.stride_x - s.pad_x, rest < room ? rest : room, out};
    }
    for (int k = from * taps; k < to * taps; ++k) {
        const int i = k / taps, ky = k % taps / s.kernel_w, kx = k % s.kernel_w;
        for (int n = 0; n < size; ++n) {
            const auto &piece = pieces[n];
            float *out = piece.to + (size_t)k * l.width;
            const int y = piece.y + ky, left = piece.x + kx;
            if (piece.image < 0 || y < 0 || y >= s.h) {
                for (int j = 0; j < piece.count; ++j) out[j] = 0;
                continue;
            }
            const float *line = call.x + (((size_t)piece.image * s.ci + i) * s.h + y) * s.w;
            if (s.stride_x == 1) {
                copy_line(out, line, left, piece.count, s.w);
                continue;
            }
            for (int j = 0; j < piece.count; ++j) {
                const int x = left + j * s.stride_x;
                out[j] = x >= 0 && x < s.w ? line[x] : 0;
            }
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

inline void put_line(float *y, const float *sums, const float *add, float constant, int count) {
    if (add) {
        for (int k = 0; k < count; ++k) y[k] = sums[k] + constant + add[k];
    } else {
        for (int k = 0; k < count; ++k) y[k] = sums[k] + constant;
    }
}

// One vector of tiles: m (panels, ROWS, width) -> `count` channels of the output.
inline void finish_tiles(const conv_call &call, const layout &l, int64_t first, int channel, int count,
                         const float *m) {
    const conv_shape &s = call.shape;
    for (int o = 0; o < count; ++o, m += l.width) {
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
        for (int tile = 0; tile < LANES && first + tile < l.columns; tile += l.run) {
            const place at = place_of(l, first + tile);
            const int width = s.w - at.left < TILE * l.run ? s.w - at.left : TILE * l.run;
            const size_t offset = (((size_t)at.image * s.co + channel + o) * s.h + at.top) * s.w + at.left;
            const float constant = constant_of(call, at.image, channel + o);
            for (int r = 0; r < TILE && at.top + r < s.h; ++r) {
                const size_t line = offset + (size_t)r * s.w;
                const float *add = call.add && !call.add_is_constant ? call.add + line : nullptr;
                put_line(call.y + line, pixels[r] + TILE * tile, add, constant, width);
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
            put_line(call.y + offset, m + (size_t)o * l.width + at, add, constant_of(call, image, channel + o), pixels);
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
        if (l.vectors == 1) multiply<1>(u, v + p * l.panel_floats, l.depth, out);
        else multiply<MAX_VECTORS>(u, v + p * l.panel_floats, l.depth, out);
    }
    const int channel = group * ROWS, count = call.shape.co - channel < ROWS ? call.shape.co - channel : ROWS;
    const int64_t first = (int64_t)block * l.width;
    if (!l.winograd) return finish_pixels(call, l, first, channel, count, m);
    for (int n = 0; n < l.vectors; ++n) finish_tiles(call, l, first + n * LANES, channel, count, m + n * LANES);
}
