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

inline size_t start_of(const attention_call &call, const head_strides &of, int head) {
    return head / call.heads * of.picture + head % call.heads * of.head;
}

// (rows, depth), whose elements lie `row` and `step` floats apart -> (groups, depth, ROWS)
inline void pack_rows(const float *from, int rows, int depth, size_t row, size_t step, float *packed) {
    for (int first = 0; first < rows; first += ROWS) {
        const int count = rows - first < ROWS ? rows - first : ROWS;
        for (int k = 0; k < depth; ++k, packed += ROWS) {
            if (row == 1 && count == ROWS) {
                memcpy(packed, from + first + k * step, sizeof(float[ROWS]));
                continue;
            }
            for (int r = 0; r < ROWS; ++r) packed[r] = r < count ? from[(first + r) * row + k * step] : 0;
        }
    }
}

// Keys and values of one head of all pictures'.
inline void pack_head(const attention_call &call, const attention_layout &l, int head, float *packed) {
    const head_strides &k = call.of_k, &v = call.of_v;
    pack_rows(call.k + start_of(call, k, head), call.keys, call.depth, k.row, k.column, packed);
    pack_rows(call.v + start_of(call, v, head), call.values, call.keys, v.column, v.row, packed + l.key_floats);
}

// One block of queries of one head, whose keys and values are packed. own: block_floats.
inline void attend(const attention_call &call, const attention_layout &l, int head, int block, const float *packed,
                   float *own) {
    const int first = block * QUERIES, count = call.queries - first < QUERIES ? call.queries - first : QUERIES;
    const float *q = call.q + start_of(call, call.of_q, head) + first * call.of_q.row;
    float *query = own, *scores = query + (size_t)call.depth * QUERIES;
    float *sums = scores + (size_t)groups_of(call.keys) * ROWS * QUERIES;
    for (int k = 0; k < call.depth; ++k) {
        const float *column = q + k * call.of_q.column;
        for (int j = 0; j < QUERIES; ++j)
            query[k * QUERIES + j] = j < count ? column[j * call.of_q.row] * call.scale : 0;
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
    float *y = call.y + start_of(call, call.of_y, head) + first * call.of_y.row;
    for (int i = 0; i < call.values; ++i) {
        float line[QUERIES];
        for (int n = 0; n < 2; ++n) store(line + n * LANES, load(sums + (size_t)i * QUERIES + n * LANES) * inverse[n]);
        float *to = y + i * call.of_y.column;
        if (call.of_y.row == 1) memcpy(to, line, count * sizeof(float));
        for (int j = 0; call.of_y.row > 1 && j < count; ++j) to[j * call.of_y.row] = line[j];
    }
}
