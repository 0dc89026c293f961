// Attention of query rows over sealed pages, without float32 copies of them: decode, and prefill where byte_products says so. A chunk is one
// record of one head; it becomes one partial (../attention.py), and `merge_chunks` joins partials in order.
// Included inside an anonymous namespace, after pages.h.
//
// A quantised key is lo + code * scale, so q.k = q.lo + (q * scale).code: queries are scaled once for each page, and keys
// are only widened to float. Values likewise: sum w * v = sum (w * scale) * code + sum w * lo. Where values are the keys, scale and lo are
// the channel's, and stand before the sum.

// Query rows and weights become whole numbers of sixteen bits for each page: their error, 2**-16 of the greatest, is a
// hundredth of that of the codes themselves, products are exact, and they run at twice the rate of float32's.

// What one chunk of codes needs to work in.
struct CodesSpace {
    int64_t wide, padded, stride;  // head_dim, a page's tokens, a chunk's scores, in whole lanes
    int64_t tiles_at, floats;      // where bytes and where floats begin, in floats
    int64_t page_sums;             // of one page, where its channels have scales; 0: none
    int64_t tile_bytes;            // of one page, for which there is room once more
    CodesSpace(const Layout &l, int64_t rows)
        : wide(whole_lanes(l.head_dim)), padded(whole_lanes(l.page_tokens)),
          stride(whole_lanes((l.pages_per_record - 1) * l.page_tokens) + padded), page_sums(l.shares() ? rows * wide : 0),
          tile_bytes(ebbtide::tile_bytes(l.page_tokens, l.head_dim)) {
        floats = rows * (stride + wide + 2) + page_sums + 16;
        const int64_t longer = wide > padded ? wide : padded;
        tiles_at = floats + (rows * 2 * longer + 3) / 4;
        tiles_at += 16;
    }
    int64_t all() const { return tiles_at + 2 * tile_bytes / 4 + 16; }
};

// What one task needs to work in, in floats.
int64_t attend_scratch(const Layout &l, int64_t rows) {
    const int64_t raw = runs_scratch(l.head_dim, rows, l.pages_per_record * l.page_tokens);
    return (l.raw_kind != CODES ? raw : CodesSpace(l, rows).all()) + rows * (2 + l.head_dim);
}

// How the codes of a layout are read.
struct CodesReader {
    int64_t bits[2];
    int widths[MOST_PLANES] = {};
    int64_t offset[MOST_PLANES] = {};
    bool in_near[MOST_PLANES] = {};
    int count = 0;

    void add(int64_t bits, int64_t tokens, int64_t dim, int64_t start, bool near) {
        for_planes(bits, tokens, dim, [&](int width, int, int64_t at) {
            if (count < MOST_PLANES) {
                widths[count] = width;
                offset[count] = start + at;
                in_near[count] = near;
            }
            ++count;
        });
    }
    CodePlanes at(const uint8_t *near, const uint8_t *far) const {
        CodePlanes p;
        for (int i = 0; i < MOST_PLANES; ++i) p.data[i] = (in_near[i] ? near : far) + offset[i];
        return p;
    }
};

// The key codes of a page, if the list holds it.
inline Ahead keys_ahead(const Attend &a, int64_t head, int64_t record, int64_t page) {
    const Layout &l = a.layout;
    if ((record + 1) * l.pages_per_record * l.page_tokens > a.num_tokens || !a.records[record]) return Ahead();
    const Block at(l, page * l.kv_heads + head);
    return Ahead(at.near_block(l, a.near[record], a.records[record]), l.near_head_bytes, a.records[record] + at.far_at,
                 l.value_offset);
}

inline uint8_t *aligned(float *p) { return (uint8_t *)(((uintptr_t)p + 63) / 64 * 64); }

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
    attend_runs((RawKind)l.raw_kind, l.head_dim, a.rows, a.q + a.row_of(head) * l.head_dim, runs, num_runs,
                bias ? bias + first : nullptr, a.num_tokens, a.softcap, scratch, highest, total, out);
}

// One chunk's partial: highest[rows], total[rows], out[rows][head_dim].
void attend_chunk(const Attend &a, int64_t head, int64_t record, float *scratch, float *highest, float *total,
                  float *out) {
    const Layout &l = a.layout;
    const int64_t dim = l.head_dim, rows = a.rows, tokens = l.page_tokens, chunk_tokens = l.pages_per_record * tokens;
    const int64_t chunk_at = record * chunk_tokens;
    // The visible tokens of this chunk, counted within it.
    const int64_t first = a.visible_from > chunk_at ? a.visible_from - chunk_at : 0;
    const int64_t last = a.visible_to - chunk_at < chunk_tokens ? a.visible_to - chunk_at : chunk_tokens;
    for (int64_t r = 0; r < rows; ++r) {
        highest[r] = UNSEEN;
        total[r] = 0;
    }
    if (first >= last) {
        std::memset(out, 0, (size_t)(rows * dim) * 4);
        return;
    }
    const float *bias = a.bias ? a.bias + a.row_of(head) * a.num_tokens + chunk_at : nullptr;
    if (l.raw_kind != CODES) return attend_full_chunk(a, head, record, first, last, bias, scratch, highest, total, out);

    const CodesSpace space(l, rows);
    const int64_t wide = space.wide, padded = space.padded, stride = space.stride, blocks = num_blocks(dim);
    float *scores = scratch, *sums = scores + rows * stride, *base = sums + rows * wide, *step = base + rows;
    float *page_sums = step + rows;
    uint8_t *numbers = (uint8_t *)(scratch + space.floats), *tiles = aligned(scratch + space.tiles_at);
    const float *q = a.q + a.row_of(head) * dim;
    float lo[MAX_DIM], scale[MAX_DIM];
    for (int64_t j = dim; j < wide; ++j) lo[j] = scale[j] = 0;

    CodesReader keys, values;
    keys.add(l.near_bits, tokens, dim, 0, true);
    keys.add(l.far_key_bits(), tokens, dim, 0, false);
    if (l.shares())
        values = keys;
    else
        values.add(l.value_bits, tokens, dim, l.value_offset, false);
    const ReadTiles read_keys = keys.count > MOST_PLANES ? nullptr : tile_reader<false>(keys.widths, dim);
    const ReadTiles read_values = values.count > MOST_PLANES ? nullptr : tile_reader<BYTE_PRODUCTS>(values.widths, dim);

    const bool spreads = can_spread(tokens, dim);

    const int64_t first_page = first / tokens, last_page = (last + tokens - 1) / tokens;
    const float largest_key = largest_step(wide, l.key_bits), largest_weight = largest_step(padded, l.shares() ? l.key_bits : l.value_bits);
    for (int64_t page = first_page; page < last_page; ++page) {
        const Block at(l, page * l.kv_heads + head);
        const uint8_t *far = a.records[record] + at.far_at;
        const uint8_t *near = at.near_block(l, a.near[record], a.records[record]);
        Ahead ahead(far + l.value_offset, l.far_head_bytes - l.value_offset);
        ahead.spread_over(whole_lanes(tokens) / 16 * num_row_blocks<SCORED_ROWS>(rows));
        if (read_keys)
            read_keys(keys.at(near, far), tokens, blocks, tiles);
        else if (spreads && keys.count <= MOST_PLANES)
            read_spread_tiles<false>(keys.widths, keys.at(near, far), tokens, dim, tiles);
        else
            read_any_tiles<false>(key_codes(l, near, far), tokens, dim, tiles);
        load_halves(near + l.key_min_offset, dim, lo);
        load_halves(near + l.key_min_offset + 2 * dim, dim, scale);
        by_rows<ROW_BLOCK>(rows, [&](auto count, int64_t r) {
            to_steps<decltype(count)::VALUE>(q + r * dim, dim, dim, lo, scale, largest_key, base + r, step + r, numbers + r * 2 * wide);
        });
        score_page(tiles, blocks, tokens, numbers, rows, base, step, scores + page * tokens, stride, tiles + space.tile_bytes, ahead);
    }

    by_rows<ROW_BLOCK>(rows, [&](auto count, int64_t r) {
        soften<decltype(count)::VALUE>(scores + r * stride, stride, first, last, bias ? bias + r * a.num_tokens : nullptr, a.num_tokens,
                                       a.softcap, highest + r, total + r);
    });
    std::memset(sums, 0, (size_t)(rows * (wide + 1)) * 4);  // and base
    float ones[MAX_DIM];
    for (int64_t j = 0; j < padded; ++j) ones[j] = j < tokens ? 1.0f : 0.0f;
    if (!l.shares())
        for (int64_t j = tokens; j < padded; ++j) lo[j] = scale[j] = 0;
    for (int64_t page = first_page; page < last_page; ++page) {
        const Block at(l, page * l.kv_heads + head);
        const uint8_t *far = a.records[record] + at.far_at;
        const uint8_t *near = at.near_block(l, a.near[record], a.records[record]);
        Ahead ahead = keys_ahead(a, head, record + 1, page);
        ahead.spread_over(num_tile_steps(tokens, blocks) * num_row_blocks<WEIGHED_ROWS>(rows));
        if (read_values)
            read_values(values.at(near, far), tokens, blocks, tiles);
        else if (spreads && values.count <= MOST_PLANES)
            read_spread_tiles<BYTE_PRODUCTS>(values.widths, values.at(near, far), tokens, dim, tiles);
        else
            read_any_tiles<true>(l.shares() ? key_codes(l, near, far) : value_codes(l, far), tokens, dim, tiles);
        if (l.shares()) {
            load_halves(near + l.key_min_offset, dim, lo);
            load_halves(near + l.key_min_offset + 2 * dim, dim, scale);
        } else {
            load_halves(far + l.value_min_offset, tokens, lo);
            load_halves(far + l.value_min_offset + 2 * tokens, tokens, scale);
        }
        const float *token_lo = l.shares() ? ones : lo, *token_scale = l.shares() ? ones : scale;
        float *to = l.shares() ? page_sums : sums;
        if (l.shares()) std::memset(page_sums, 0, (size_t)(rows * wide) * 4);
        by_rows<ROW_BLOCK>(rows, [&](auto count, int64_t r) {
            constexpr int ROWS = decltype(count)::VALUE;
            float along[ROWS];
            to_steps<ROWS>(scores + r * stride + page * tokens, stride, padded, token_lo, token_scale, largest_weight, along, step + r,
                           numbers + r * 2 * padded);
            for (int i = 0; i < ROWS; ++i) base[r + i] += along[i];
        });
        add_page(tiles, blocks, tokens, numbers, padded, rows, step, to, ahead);
        if (!l.shares()) continue;
        for (int64_t r = 0; r < rows; ++r) {  // base: the page's weights
            const Lanes all_weights = all(base[r]);
            for (int64_t j = 0; j < wide; j += 16) {
                const Lanes along = mul_add(load(page_sums + r * wide + j), load(scale + j), mul(all_weights, load(lo + j)));
                store(sums + r * wide + j, add(load(sums + r * wide + j), along));
            }
            base[r] = 0;
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
