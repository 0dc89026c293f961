// Attention of a few query rows over sealed pages, without float32 copies of them: the decode step. A chunk is one
// record of one head; it becomes one partial (../attention.py), and `merge_chunks` joins partials in order.
// Included inside an anonymous namespace, after pages.h.
//
// A quantised key is lo + code * scale, so q.k = q.lo + (q * scale).code: queries are scaled once for each page, and keys
// are only widened to float. Values likewise: sum w * v = sum (w * scale) * code + sum w * lo.

constexpr int64_t PAGE_BLOCK = 4;  // tokens of a page that are unpacked together; divides page_tokens

// What one task needs to work in, in floats.
int64_t attend_scratch(const Layout &l, int64_t rows) {
    const int64_t dim = whole_lanes(l.head_dim), tokens = whole_lanes(l.pages_per_record * l.page_tokens);
    const int64_t raw = runs_scratch(l.head_dim, rows, tokens), codes = rows * (tokens + 2 * dim + 1) + PAGE_BLOCK * dim;
    return (raw > codes ? raw : codes) + rows * (2 + l.head_dim);
}

// scores[r * stride + t] = base[r] + q[r].k[t] for PAGE_BLOCK tokens and ROWS rows.
template <int ROWS>
inline void score_block(const float *q, const float *base, const float *k, int64_t dim, float *scores, int64_t stride) {
    Lanes acc[ROWS][PAGE_BLOCK];
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < PAGE_BLOCK; ++t) acc[r][t] = zero();
    for (int64_t j = 0; j < dim; j += 16) {
        Lanes key[PAGE_BLOCK];
        for (int t = 0; t < PAGE_BLOCK; ++t) key[t] = load(k + t * dim + j);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes query = load(q + r * dim + j);
            for (int t = 0; t < PAGE_BLOCK; ++t) acc[r][t] = mul_add(query, key[t], acc[r][t]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        float *out = scores + r * stride;
        sum_four(acc[r][0], acc[r][1], acc[r][2], acc[r][3], out);
        for (int t = 0; t < PAGE_BLOCK; ++t) out[t] += base[r];
    }
}

// out[r] += sum over PAGE_BLOCK tokens of weights[r * stride + t] * v[t], in the order of tokens.
template <int ROWS>
inline void value_block(const float *weights, int64_t stride, const float *v, int64_t dim, float *out) {
    Lanes weight[ROWS][PAGE_BLOCK];
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < PAGE_BLOCK; ++t) weight[r][t] = all(weights[r * stride + t]);
    for (int64_t j = 0; j < dim; j += 16) {
        Lanes value[PAGE_BLOCK];
        for (int t = 0; t < PAGE_BLOCK; ++t) value[t] = load(v + t * dim + j);
        for (int r = 0; r < ROWS; ++r) {
            Lanes sum = load(out + r * dim + j);
            for (int t = 0; t < PAGE_BLOCK; ++t) sum = mul_add(weight[r][t], value[t], sum);
            store(out + r * dim + j, sum);
        }
    }
}

inline void widen(const uint8_t *codes, int64_t dim, float *out) {
    int64_t j = 0;
    for (; j + 16 <= dim; j += 16) store(out + j, load_u8(codes + j));
    for (; j < dim; ++j) out[j] = (float)codes[j];
}

// A chunk of full pages, tokens first .. last - 1.
inline void attend_full_chunk(const Attend &a, int64_t head, int64_t record, int64_t first, int64_t last, const float *bias,
                              float *scratch, float *highest, float *total, float *out) {
    const Layout &l = a.layout;
    const int64_t tokens = l.page_tokens, row_bytes = raw_row_bytes((RawKind)l.raw_kind, l.head_dim);
    RawRun runs[MAX_RUNS];
    int64_t num_runs = 0;
    for (int64_t page = first / tokens; page * tokens < last; ++page) {
        const int64_t begin = first > page * tokens ? first - page * tokens : 0;
        const int64_t end = last - page * tokens < tokens ? last - page * tokens : tokens;
        const uint8_t *far = a.records[record] + Block(l, page * l.kv_heads + head).far_at + begin * row_bytes;
        runs[num_runs++] = {far, far + l.value_offset, 0, end - begin};
    }
    attend_runs((RawKind)l.raw_kind, l.head_dim, a.rows, a.q + head * a.rows * l.head_dim, runs, num_runs,
                bias ? bias + first : nullptr, a.num_tokens, a.softcap, scratch, highest, total, out);
}

// One chunk's partial: highest[rows], total[rows], out[rows][head_dim].
void attend_chunk(const Attend &a, int64_t head, int64_t record, float *scratch, float *highest, float *total,
                  float *out) {
    const Layout &l = a.layout;
    const int64_t dim = l.head_dim, wide = whole_lanes(dim), rows = a.rows, tokens = l.page_tokens;
    const int64_t chunk_tokens = l.pages_per_record * tokens, stride = whole_lanes(chunk_tokens);
    const int64_t chunk_at = record * chunk_tokens;
    // The visible tokens of this chunk, counted within it.
    const int64_t first = a.visible_from > chunk_at ? a.visible_from - chunk_at : 0;
    const int64_t last = a.visible_to - chunk_at < chunk_tokens ? a.visible_to - chunk_at : chunk_tokens;
    for (int64_t r = 0; r < rows; ++r) {
        highest[r] = UNSEEN;
        total[r] = 0;
    }
    std::memset(out, 0, (size_t)(rows * dim) * 4);
    if (first >= last) return;
    const float *bias = a.bias ? a.bias + head * rows * a.num_tokens + chunk_at : nullptr;
    if (l.raw_kind != CODES) return attend_full_chunk(a, head, record, first, last, bias, scratch, highest, total, out);

    float *scores = scratch, *queries = scores + rows * stride, *sums = queries + rows * wide;
    float *base = sums + rows * wide, *block = base + rows;
    std::memset(queries, 0, (size_t)(rows * wide * 2 + rows + PAGE_BLOCK * wide) * 4);  // lanes beyond dim stay 0
    float lo[MAX_DIM], scale[MAX_DIM];
    uint8_t codes[MAX_DIM];
    const float *q = a.q + head * rows * dim;

    const int64_t first_page = first / tokens, last_page = (last + tokens - 1) / tokens;
    for (int64_t page = first_page; page < last_page; ++page) {
        const Block at(l, page * l.kv_heads + head);
        const uint8_t *far = a.records[record] + at.far_at;
        const uint8_t *near = at.near_block(l, a.near[record], a.records[record]);
        load_halves(near + l.key_min_offset, dim, lo);
        load_halves(near + l.key_min_offset + 2 * dim, dim, scale);
        for (int64_t r = 0; r < rows; ++r) {
            const float *query = q + r * dim;
            Lanes along = zero();
            float rest = 0;
            int64_t j = 0;
            for (; j + 16 <= dim; j += 16) {
                along = mul_add(load(query + j), load(lo + j), along);
                store(queries + r * wide + j, mul(load(query + j), load(scale + j)));
            }
            for (; j < dim; ++j) {
                rest += query[j] * lo[j];
                queries[r * wide + j] = query[j] * scale[j];
            }
            base[r] = sum(along) + rest;
        }
        const CodeReader reader = key_codes(l, near, far);
        for (int64_t t = 0; t < tokens; t += PAGE_BLOCK) {
            for (int64_t i = 0; i < PAGE_BLOCK; ++i) {
                reader.read(t + i, codes);
                widen(codes, dim, block + i * wide);
            }
            float *to = scores + page * tokens + t;
            int64_t r = 0;
            for (; r + ROW_BLOCK <= rows; r += ROW_BLOCK)
                score_block<ROW_BLOCK>(queries + r * wide, base + r, block, wide, to + r * stride, stride);
            for (; r < rows; ++r) score_block<1>(queries + r * wide, base + r, block, wide, to + r * stride, stride);
        }
    }

    for (int64_t r = 0; r < rows; ++r)
        soften(scores + r * stride, stride, first, last, bias ? bias + r * a.num_tokens : nullptr, a.softcap, highest + r, total + r);
    for (int64_t r = 0; r < rows; ++r) base[r] = 0;
    for (int64_t page = first_page; page < last_page; ++page) {
        const Block at(l, page * l.kv_heads + head);
        const uint8_t *far = a.records[record] + at.far_at;
        float *weights = scores + page * tokens;
        load_halves(far + l.value_min_offset, tokens, lo);
        load_halves(far + l.value_min_offset + 2 * tokens, tokens, scale);
        for (int64_t r = 0; r < rows; ++r) {
            float *row = weights + r * stride;
            Lanes along = zero();
            float rest = 0;
            int64_t t = 0;
            for (; t + 16 <= tokens; t += 16) {
                along = mul_add(load(row + t), load(lo + t), along);
                store(row + t, mul(load(row + t), load(scale + t)));
            }
            for (; t < tokens; ++t) {
                rest += row[t] * lo[t];
                row[t] *= scale[t];
            }
            base[r] += sum(along) + rest;
        }
        const CodeReader reader = value_codes(l, far);
        for (int64_t t = 0; t < tokens; t += PAGE_BLOCK) {
            for (int64_t i = 0; i < PAGE_BLOCK; ++i) {
                reader.read(t + i, codes);
                widen(codes, dim, block + i * wide);
            }
            int64_t r = 0;
            for (; r + ROW_BLOCK <= rows; r += ROW_BLOCK)
                value_block<ROW_BLOCK>(weights + r * stride + t, stride, block, wide, sums + r * wide);
            for (; r < rows; ++r) value_block<1>(weights + r * stride + t, stride, block, wide, sums + r * wide);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < dim; ++j) out[r * dim + j] = sums[r * wide + j] + base[r];
}

// Joins partials first to last: highest[chunks][rows], total likewise, out[chunks][rows][dim].
void merge_chunks(int64_t chunks, int64_t rows, int64_t dim, const float *highest, const float *total, const float *out,
                  float *to_highest, float *to_total, float *to_out, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        float most = UNSEEN, sum_all = 0;
        for (int64_t c = 0; c < chunks; ++c) most = highest[c * rows + r] > most ? highest[c * rows + r] : most;
        float *sums = to_out + r * dim;
        std::memset(sums, 0, (size_t)dim * 4);
        for (int64_t c = 0; c < chunks; ++c) {
            if (total[c * rows + r] == 0) continue;  // sees nothing of this chunk
            float share[16];
            store(share, exp_lanes(all(highest[c * rows + r] - most)));
            sum_all += total[c * rows + r] * share[0];
            const float *part = out + (c * rows + r) * dim;
            for (int64_t j = 0; j < dim; ++j) sums[j] += part[j] * share[0];
        }
        to_highest[r] = most;
        to_total[r] = sum_all;
    }
}
