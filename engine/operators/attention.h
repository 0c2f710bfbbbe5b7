// Attention: softmax(scale · q kᵀ) v, for each head alone.
//
// Queries are the columns of all matrices, so that the softmax of each goes down its column.

constexpr int QUERIES = 2 * LANES;  // a block

inline int groups_of(int rows) { return (rows + ROWS - 1) / ROWS; }

inline attention_layout lay_out_attention(const attention_call &call) {
    attention_layout l = {};
    l.blocks = (call.queries + QUERIES - 1) / QUERIES;
    l.key_floats = (size_t)groups_of(call.keys) * ROWS * call.depth;
    l.head_floats = l.key_floats + (size_t)groups_of(call.values) * ROWS * call.keys;
    l.block_floats =
        (size_t)QUERIES * (call.depth + (size_t)groups_of(call.keys) * ROWS + groups_of(call.values) * ROWS);
    return l;
}

// (rows, depth), whose elements lie `row` and `step` floats apart -> (groups, depth, ROWS)
inline void pack_rows(const float *from, int rows, int depth, size_t row, size_t step, float *packed) {
    for (int first = 0; first < rows; first += ROWS) {
        const int count = rows - first < ROWS ? rows - first : ROWS;
        for (int k = 0; k < depth; ++k, packed += ROWS) {
            for (int r = 0; r < ROWS; ++r) packed[r] = r < count ? from[(first + r) * row + k * step] : 0;
        }
    }
}

// Keys and values of one head.
inline void pack_head(const attention_call &call, const attention_layout &l, int head, float *packed) {
    const size_t keys = call.keys, depth = call.depth, values = call.values;
    const float *k = call.k + head * keys * depth, *v = call.v + head * keys * values;
    pack_rows(k, call.keys, call.depth, call.keys_are_rows ? depth : 1, call.keys_are_rows ? 1 : keys, packed);
    packed += l.key_floats;
    pack_rows(v, call.values, call.keys, call.values_are_rows ? 1 : keys, call.values_are_rows ? values : 1, packed);
}

// One block of queries of one head, whose keys and values are packed. own: block_floats.
inline void attend(const attention_call &call, const attention_layout &l, int head, int block, const float *packed,
                   float *own) {
    const int first = block * QUERIES, count = call.queries - first < QUERIES ? call.queries - first : QUERIES;
    const float *q = call.q + ((size_t)head * call.queries + first) * call.depth;
    float *query = own, *scores = query + (size_t)call.depth * QUERIES;
    float *sums = scores + (size_t)groups_of(call.keys) * ROWS * QUERIES;
    for (int k = 0; k < call.depth; ++k) {
        for (int j = 0; j < QUERIES; ++j)
            query[k * QUERIES + j] = j < count ? q[(size_t)j * call.depth + k] * call.scale : 0;
    }
    for (int g = 0; g < groups_of(call.keys); ++g) {
        multiply<2>(packed + (size_t)g * call.depth * ROWS, query, call.depth, scores + (size_t)g * ROWS * QUERIES);
    }
    vec inverse[2];
    for (int n = 0; n < 2; ++n) {
        float *column = scores + n * LANES;
        vec most = load(column), sum = {};
        for (int t = 1; t < call.keys; ++t) {
            const vec score = load(column + (size_t)t * QUERIES);
            most = most > score ? most : score;
        }
        for (int t = 0; t < call.keys; ++t) {
            const vec part = exponential(load(column + (size_t)t * QUERIES) - most);
            store(column + (size_t)t * QUERIES, part);
            sum += part;
        }
        inverse[n] = 1.0f / sum;
    }
    for (int g = 0; g < groups_of(call.values); ++g) {
        const float *v = packed + l.key_floats + (size_t)g * call.keys * ROWS;
        multiply<2>(v, scores, call.keys, sums + (size_t)g * ROWS * QUERIES);
    }
    float *y = call.y + ((size_t)head * call.queries + first) * call.values;
    for (int i = 0; i < call.values; ++i) {
        float line[QUERIES];
        for (int n = 0; n < 2; ++n) store(line + n * LANES, load(sums + (size_t)i * QUERIES + n * LANES) * inverse[n]);
        for (int j = 0; j < count; ++j) y[(size_t)j * call.values + i] = line[j];
    }
}
