// What the near plane says about each page (../score.py has the formulas). Included inside an anonymous namespace, after
// pages.h, attend.h (cap_scores) and codes.h.

constexpr int SCORE_ROWS = 4;  // query rows worked on together: codes are unpacked once for all of them

// How one plane of near codes is read: in place, or, where tokens do not lie evenly, from a copy with longer slots.
struct NearPlane {
    int64_t offset, run, slot, query_at;
    int width;
};
struct NearPlanes {
    NearPlane planes[2];  // of at most four bits
    int count = 0;
    bool in_place;
    int64_t query_bytes = 0, copy_bytes = 0;  // of one row, arranged for every plane; of one plane

    explicit NearPlanes(const Layout &l) : in_place(l.page_tokens % 16 == 0) {
        for_planes(l.near_bits, l.page_tokens, l.head_dim, [&](int width, int, int64_t offset) {
            const int64_t run = l.head_dim * width / 8, slot = slot_of(run);
            in_place = in_place && run == slot;
            planes[count++] = {offset, run, slot, query_bytes, width};
            query_bytes += arranged_bytes(slot, width);
            const int64_t bytes = whole_lanes(l.page_tokens) * slot;
            copy_bytes = bytes > copy_bytes ? bytes : copy_bytes;
        });
    }
};

// What one task needs to work in, in bytes.
int64_t score_scratch(const Layout &l) {
    const NearPlanes near(l);
    return SCORE_ROWS * (near.query_bytes + 4 * whole_lanes(l.page_tokens)) + 2 * near.copy_bytes;
}

// One page and ROWS query rows: everything that depends on both.
template <int ROWS>
struct PageRows {
    float base[4], step[4];

    // Queries times the bins' widths, as whole numbers of at most 127 steps, laid out for every plane. base is the score of
    // a key with code 0 everywhere.
    void quantise(const float *q, const float *middle, const float *width, int64_t wide, float centre,
                  const NearPlanes &near, int8_t *arranged) {
        constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: a sum with it is rounded to a whole number
        int8_t steps[ROWS][MAX_DIM];
        float greatest[4], counted[4];
        Lanes along[4], most[4], count[4];
        for (int r = 0; r < 4; ++r) along[r] = most[r] = count[r] = zero();
        for (int64_t j = 0; j < wide; j += 16) {
            const Lanes bins = load(width + j), from = load(middle + j);
            for (int r = 0; r < ROWS; ++r) {
                const Lanes query = load(q + r * wide + j), in_bins = mul(query, bins);
                along[r] = mul_add(query, from, along[r]);
                most[r] = larger(most[r], larger(in_bins, sub(zero(), in_bins)));
            }
        }
        sum_four(along[0], along[1], along[2], along[3], base);
        largest_four(most[0], most[1], most[2], most[3], greatest);
        Lanes scale[ROWS];
        for (int r = 0; r < ROWS; ++r) scale[r] = all(greatest[r] > 1e-30f ? 1.0f / greatest[r] * 127.0f : 0.0f);
        for (int64_t j = 0; j < wide; j += 16) {
            const Lanes bins = load(width + j);
            for (int r = 0; r < ROWS; ++r) {
                const Lanes rounded = add(mul(mul(load(q + r * wide + j), bins), scale[r]), all(ROUND));
                store_low_bytes(steps[r] + j, rounded);
                count[r] = add(count[r], sub(rounded, all(ROUND)));
            }
        }
        sum_four(count[0], count[1], count[2], count[3], counted);
        for (int r = 0; r < ROWS; ++r) {
            step[r] = greatest[r] / 127.0f;
            base[r] -= step[r] * centre * counted[r];
            for (int p = 0; p < near.count; ++p)
                arrange_query(steps[r], near.planes[p].run, near.planes[p].slot, near.planes[p].width,
                              arranged + r * near.query_bytes + near.planes[p].query_at);
        }
    }

    // scores[r][t] = (scores so far << WIDTH) + sum of code * q[r], for every token of a plane.
    template <int WIDTH>
    void add_plane(const uint8_t *plane, int64_t slot, int64_t tokens, const int8_t *q, int64_t query_bytes, bool first,
                   float *scores) {
        Ints sums[ROWS];
        for (int64_t t = 0; t < tokens; t += 16) {
            dot_sixteen<WIDTH, ROWS>(plane + t * slot, slot, q, query_bytes, sums);
            for (int r = 0; r < ROWS; ++r) {
                float *to = scores + r * tokens + t;
                const Lanes lanes = to_lanes(sums[r]);
                store(to, first ? lanes : mul_add(load(to), all((float)(1 << WIDTH)), lanes));
            }
        }
    }

    void add_planes(const NearPlanes &near, const uint8_t *const *planes, int64_t tokens, const int8_t *q, float *scores) {
        if (!near.count) std::memset(scores, 0, (size_t)(ROWS * tokens) * 4);
        for (int p = 0; p < near.count; ++p) {
            const NearPlane &at = near.planes[p];
            const int8_t *query = q + at.query_at;
            switch (at.width) {
                case 1: add_plane<1>(planes[p], at.slot, tokens, query, near.query_bytes, p == 0, scores); break;
                case 2: add_plane<2>(planes[p], at.slot, tokens, query, near.query_bytes, p == 0, scores); break;
                default: add_plane<4>(planes[p], at.slot, tokens, query, near.query_bytes, p == 0, scores);
            }
        }
    }

    // Scores, still to be scaled, to what they say about the page. `stride` is `tokens` made whole lanes.
    void summarise(const Score &s, int64_t row, int64_t page, int64_t stride, float *scores) {
        const int64_t tokens = s.layout.page_tokens;
        float most[4], total[4], uneven[4];
        Lanes tops[4], along[4], apart[4];
        for (int r = 0; r < 4; ++r) {
            tops[r] = all(UNSEEN);
            along[r] = apart[r] = zero();
        }
        for (int64_t t = 0; t < stride; t += 16)
            for (int r = 0; r < ROWS; ++r) {
                float *at = scores + r * stride + t;
                const Lanes score = mul_add(load(at), all(step[r]), all(base[r]));
                store(at, score);
                tops[r] = larger(tops[r], score);
            }
        if (s.bias || s.softcap != 0 || tokens != stride)
            for (int r = 0; r < ROWS; ++r) tops[r] = finish_scores(s, row + r, page, stride, scores + r * stride);
        largest_four(tops[0], tops[1], tops[2], tops[3], most);
        for (int64_t t = 0; t < stride; t += 16)
            for (int r = 0; r < ROWS; ++r) {
                float *at = scores + r * stride + t;
                const Lanes weight = exp_lanes(sub(load(at), all(most[r])));
                store(at, weight);
                along[r] = add(along[r], weight);
            }
        if (tokens != stride)
            for (int r = 0; r < ROWS; ++r) {
                along[r] = zero();
                for (int64_t t = tokens; t < stride; ++t) scores[r * stride + t] = 0;
                for (int64_t t = 0; t < stride; t += 16) along[r] = add(along[r], load(scores + r * stride + t));
            }
        sum_four(along[0], along[1], along[2], along[3], total);
        for (int r = 0; r < ROWS; ++r) {
            const float mean = total[r] / (float)tokens;
            for (int64_t t = tokens; t < stride; ++t) scores[r * stride + t] = mean;
            for (int64_t t = 0; t < stride; t += 16) {
                const Lanes over = sub(load(scores + r * stride + t), all(mean));
                apart[r] = add(apart[r], larger(over, sub(zero(), over)));
            }
        }
        sum_four(apart[0], apart[1], apart[2], apart[3], uneven);
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = (row + r) * s.num_pages + page;
            s.log_mass[at] = most[r] + std::log(total[r]);
            s.unevenness[at] = uneven[r] / (2 * total[r]);
        }
    }

    // The rarer steps: bias, soft-cap, lanes beyond the page. Returns the largest of each lane.
    Lanes finish_scores(const Score &s, int64_t row, int64_t page, int64_t stride, float *scores) {
        const int64_t tokens = s.layout.page_tokens;
        if (s.bias) {
            const float *bias = s.bias + row * s.num_tokens + page * tokens;
            for (int64_t t = 0; t < tokens; ++t) scores[t] += bias[t];
        }
        if (s.softcap != 0) cap_scores(scores, stride, s.softcap);
        for (int64_t t = tokens; t < stride; ++t) scores[t] = UNSEEN;
        Lanes tops = all(UNSEEN);
        for (int64_t t = 0; t < stride; t += 16) tops = larger(tops, load(scores + t));
        return tops;
    }
};

// What all rows of one page and head need.
struct ScoredPage {
    const NearPlanes &near;
    const float *middle, *width;
    const uint8_t *planes[2];
    int64_t page;
    int8_t *queries;
    float *scores;
};

template <int ROWS>
inline void score_rows(const Score &s, const ScoredPage &page, int64_t row) {
    const Layout &l = s.layout;
    const int64_t wide = whole_lanes(l.head_dim), stride = whole_lanes(l.page_tokens);
    const float centre = (float)((1 << l.near_bits) - 1) / 2;
    PageRows<ROWS> rows;
    rows.quantise(s.q + row * wide, page.middle, page.width, wide, centre, page.near, page.queries);
    rows.add_planes(page.near, page.planes, stride, page.queries, page.scores);
    rows.summarise(s, row, page.page, stride, page.scores);
}

// The near block that is read after block i of a record; its own where it is the last.
inline const uint8_t *next_block(const Score &s, int64_t record, int64_t i) {
    if (i + 1 < s.layout.blocks_per_record()) return s.near[record] + (i + 1) * s.layout.near_head_bytes;
    return s.near[(record + 1) * s.layout.pages_per_record < s.num_pages ? record + 1 : record];
}

// One record's pages, all heads.
void score_record(const Score &s, int64_t record, uint8_t *scratch) {
    const Layout &l = s.layout;
    const NearPlanes near(l);
    const int64_t dim = l.head_dim, wide = whole_lanes(dim), tokens = l.page_tokens;
    const float half_box = (float)((1 << l.key_bits) - 1) / 2, bin = (float)(1 << l.far_key_bits());
    alignas(64) float middle[MAX_DIM], width[MAX_DIM];
    for (int64_t j = dim; j < wide; ++j) middle[j] = width[j] = 0;
    int8_t *queries = (int8_t *)scratch;
    uint8_t *copies = scratch + SCORE_ROWS * near.query_bytes;
    float *scores = (float *)(copies + 2 * near.copy_bytes);

    for (int64_t i = 0; i < l.blocks_per_record(); ++i) {
        const int64_t head = i % l.kv_heads;
        const uint8_t *block = s.near[record] + i * l.near_head_bytes;
        // A block is worked on for longer than the hardware looks ahead. In this function, as a compiler may find that one
        // which does nothing else has no effect and leave it out.
        const uint8_t *next = next_block(s, record, i);
        for (int64_t j = 0; j < l.near_head_bytes; j += 64) __builtin_prefetch(next + j, 0, 2);
        load_halves(block + l.key_min_offset, dim, middle);
        load_halves(block + l.key_min_offset + 2 * dim, dim, width);
        for (int64_t j = 0; j < wide; j += 16) {
            store(middle + j, mul_add(load(width + j), all(half_box), load(middle + j)));
            store(width + j, mul(load(width + j), all(bin)));
        }
        ScoredPage page{near, middle, width, {}, record * l.pages_per_record + i / l.kv_heads, queries, scores};
        for (int p = 0; p < near.count; ++p) {
            page.planes[p] = near.in_place ? block + near.planes[p].offset : copies + p * near.copy_bytes;
            if (!near.in_place)
                spread_tokens(block + near.planes[p].offset, near.planes[p].run, near.planes[p].slot, tokens,
                              copies + p * near.copy_bytes);
        }
        int64_t r = 0;
        for (; r + 4 <= s.rows; r += 4) score_rows<4>(s, page, head * s.rows + r);
        for (; r + 2 <= s.rows; r += 2) score_rows<2>(s, page, head * s.rows + r);
        if (r < s.rows) score_rows<1>(s, page, head * s.rows + r);
    }
}
