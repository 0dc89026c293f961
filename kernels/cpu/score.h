// What the near plane says about each page (../score.py has the formulas). Included inside an anonymous namespace, after
// pages.h, runs.h (cap_scores) and codes.h.

constexpr int SCORE_ROWS = 4;    // query rows worked on together: codes are unpacked once for all of them
constexpr int SCORE_BLOCKS = 8;  // blocks worked on together, in half of the nearest cache
constexpr int SCORED_AT_ONCE = SCORE_BLOCKS * SCORE_ROWS;

// A plane of near codes, and where the parts of queries in whole steps are that meet it.
struct NearPlane {
    int64_t offset, run;        // bytes: of the plane in a block, of one token
    int64_t query_at, part_at;  // elements: of the first part, from part to part
    int width;
};
struct NearPlanes {
    NearPlane planes[2];  // of at most four bits
    int count = 0;
    int64_t elements;  // of a query: in order, and once more for each plane whose parts are no whole columns

    explicit NearPlanes(const Layout &l) : elements(whole_lanes(l.head_dim)) {
        for_planes(l.near_bits, l.page_tokens, l.head_dim, [&](int width, int, int64_t offset) {
            const int64_t run = l.head_dim * width / 8, part = whole_lanes(run);
            planes[count++] = {offset, run, run == part ? 0 : elements, part, width};
            if (run != part) elements += part * 8 / width;
        });
    }
};

// Where element j of query r is among the bytes of four queries.
inline int64_t query_byte(int64_t j, int64_t r) { return j / 4 * 16 + r * 4 + j % 4; }

// The parts of four queries once more, each filled up with zeros.
inline void spread_queries(const NearPlane &plane, int8_t *queries) {
    int8_t *to = queries + 4 * plane.query_at;
    std::memset(to, 0, (size_t)(4 * plane.part_at * 8 / plane.width));
    for (int64_t i = 0; i < 8 / plane.width; ++i, to += 4 * plane.part_at)
        if (plane.run % 4 == 0)
            std::memcpy(to, queries + 4 * i * plane.run, (size_t)(4 * plane.run));
        else
            for (int64_t j = 0; j < plane.run; ++j)
                for (int64_t r = 0; r < 4; ++r) to[query_byte(j, r)] = queries[query_byte(i * plane.run + j, r)];
}

// Some blocks of near records with ROWS queries of each one's head, worked on step by step: what one row waits for is time for
// another. A row is one query's with one block; a block's rows lie side by side.
struct ScoredBlocks {
    const Score &s;
    const NearPlanes &near;
    int64_t wide, stride;  // head_dim and page_tokens in whole lanes
    struct {
        const uint8_t *near, *later;  // the block; one to ask for meanwhile, or null
        int64_t head, page;
    } blocks[SCORE_BLOCKS];
    int64_t count;
    int8_t *queries;  // four for each block, in whole steps; element j of query r is at query_byte
    float *lanes;     // of each row: its query times the bins' widths; then whole scores, in lane_of_token's order; then weights
    float base[SCORED_AT_ONCE] = {}, step[SCORED_AT_ONCE] = {};  // of each row: a score is base + step * its whole number
    float scale[SCORED_AT_ONCE], most[SCORED_AT_ONCE], total[SCORED_AT_ONCE], above[SCORED_AT_ONCE];

    ScoredBlocks(const Score &s, const NearPlanes &near, uint8_t *scratch)
        : s(s), near(near), wide(whole_lanes(s.layout.head_dim)), stride(whole_lanes(s.layout.page_tokens)),
          queries((int8_t *)scratch), lanes((float *)(scratch + SCORE_BLOCKS * 4 * near.elements)) {}

    // Takes the next blocks of a record from block `first` on.
    void take(int64_t record, int64_t first) {
        const Layout &l = s.layout;
        const int64_t left = l.blocks_per_record() - first;
        const uint8_t *next = (record + 1) * l.pages_per_record < s.num_pages ? s.near[record + 1] : nullptr;
        count = left < SCORE_BLOCKS ? left : SCORE_BLOCKS;
        for (int64_t i = 0; i < count; ++i) {
            blocks[i].near = s.near[record] + (first + i) * l.near_head_bytes;
            blocks[i].later = count + i < left ? blocks[i].near + count * l.near_head_bytes
                              : next           ? next + (count + i - left) * l.near_head_bytes
                                               : nullptr;
            blocks[i].head = (first + i) % l.kv_heads;
            blocks[i].page = record * l.pages_per_record + (first + i) / l.kv_heads;
        }
    }

    // Queries times the bins' widths, and how long steps are of which 127 reach the greatest.
    template <int ROWS>
    void measure(int64_t row) {
        const Layout &l = s.layout;
        const float half_box = (float)((1 << l.key_bits) - 1) / 2, bin = (float)(1 << l.far_key_bits());
        for (int64_t i = 0; i < count; ++i) {
            const float *q = s.q + (blocks[i].head * s.rows + row) * wide;
            const uint8_t *least = blocks[i].near + l.key_min_offset, *width = least + 2 * l.head_dim;
            float *in_bins = lanes + i * ROWS * wide;
            Lanes along[4], greatest[4];
            for (int r = 0; r < 4; ++r) along[r] = greatest[r] = zero();
            for (int64_t j = 0; j < wide; j += 16) {
                const Lanes box = load_some_f16(width + 2 * j, l.head_dim - j), bins = mul(box, all(bin));
                const Lanes middle = mul_add(box, all(half_box), load_some_f16(least + 2 * j, l.head_dim - j));
                EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                    const Lanes query = load(q + r * wide + j), scaled = mul(query, bins);
                    along[r] = mul_add(query, middle, along[r]);
                    greatest[r] = larger(greatest[r], magnitude(scaled));
                    store(in_bins + r * wide + j, scaled);
                }
            }
            sum_four(along[0], along[1], along[2], along[3], base + i * ROWS);
            largest_four(greatest[0], greatest[1], greatest[2], greatest[3], most + i * ROWS);
        }
        for (int64_t r = 0; r < count * ROWS; ++r) {
            scale[r] = most[r] > 1e-30f ? 1.0f / most[r] * 127.0f : 0.0f;
            step[r] = most[r] / 127.0f;
        }
    }

    // Queries to whole steps; base is the score of a key with code 0 everywhere.
    template <int ROWS>
    void quantise() {
        const float centre = (float)((1 << s.layout.near_bits) - 1) / 2;
        const int8_t one[4] = {1, 1, 1, 1};
        float sums[4];
        Lanes whole[4];
        for (int r = 0; r < 4; ++r) whole[r] = zero();
        for (int64_t i = 0; i < count; ++i) {
            const float *in_bins = lanes + i * ROWS * wide;
            int8_t *to = queries + i * 4 * near.elements;
            Sums counts = sums_onto(no_ints());
            for (int64_t j = 0; j < wide; j += 16) {
                EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
                    whole[r] = mul(load(in_bins + r * wide + j), all(scale[i * ROWS + r]));
                const Bits bytes = to_bytes(whole);
                store_bits(to + 4 * j, bytes);
                counts = add_products(counts, four_bytes(one), bytes);
            }
            sum_runs(to_lanes(whole_of(counts, no_ints())), sums);
            for (int r = 0; r < ROWS; ++r) base[i * ROWS + r] -= step[i * ROWS + r] * centre * sums[r];
            for (int p = 0; p < near.count; ++p)
                if (near.planes[p].query_at) spread_queries(near.planes[p], to);
        }
    }

    // scores[r][t] = (scores so far << WIDTH) + sum of code * query r, for every token of a plane of a block.
    template <int WIDTH, int ROWS>
    void add_plane(int64_t i, const NearPlane &plane, bool is_first) {
        const int64_t tokens = s.layout.page_tokens;
        const uint8_t *codes = blocks[i].near + plane.offset;
        const int8_t *q = queries + 4 * (i * near.elements + plane.query_at);
        float *scores = lanes + i * ROWS * stride;
        uint8_t last[16 * MAX_DIM / 2 + 16];
        auto add = [&](auto groups, const uint8_t *at, int64_t t) {
            constexpr int GROUPS = decltype(groups)::VALUE;
            Ints sums[GROUPS][ROWS];
            dot_tokens<WIDTH, ROWS, GROUPS>(at, plane.run, q, plane.part_at, sums);
            EBBTIDE_UNROLLED for (int n = 0; n < GROUPS; ++n)
                EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                    float *to = scores + r * stride + t + 16 * n;
                    const Lanes sum = to_lanes(sums[n][r]);
                    store(to, is_first ? sum : mul_add(load(to), all((float)(1 << WIDTH)), sum));
                }
        };
        int64_t t = 0;
        for (; t + 16 * TOGETHER <= tokens; t += 16 * TOGETHER) add(Constant<TOGETHER>(), codes + t * plane.run, t);
        for (; t + 16 <= tokens; t += 16) add(Constant<1>(), codes + t * plane.run, t);
        if (t == tokens) return;
        std::memcpy(last, codes + t * plane.run, (size_t)((tokens - t) * plane.run));
        add(Constant<1>(), last, t);
    }

    template <int ROWS>
    void add_planes(int64_t row) {
        if (!near.count) std::memset(lanes, 0, (size_t)(count * ROWS * stride) * 4);
        for (int64_t i = 0; i < count; ++i) {
            if (row == 0 && blocks[i].later) ask_for(blocks[i].later, s.layout.near_head_bytes);
            for (int p = 0; p < near.count; ++p) {
                const NearPlane &plane = near.planes[p];
                switch (plane.width) {
                    case 1: add_plane<1, ROWS>(i, plane, p == 0); break;
                    case 2: add_plane<2, ROWS>(i, plane, p == 0); break;
                    default: add_plane<4, ROWS>(i, plane, p == 0);
                }
            }
        }
    }

    // The rarer steps, bias, soft-cap and lanes beyond the page: makes scores of the whole numbers.
    template <int ROWS>
    void finish(int64_t row) {
        const int64_t tokens = s.layout.page_tokens;
        for (int64_t r = 0; r < count * ROWS; ++r) {
            float *scores = lanes + r * stride;
            for (int64_t t = 0; t < stride; t += 16) store(scores + t, mul_add(load(scores + t), all(step[r]), all(base[r])));
            if (s.bias) {
                const auto &at = blocks[r / ROWS];
                const float *bias = s.bias + (at.head * s.rows + row + r % ROWS) * s.num_tokens + at.page * tokens;
                for (int64_t t = 0; t < tokens; ++t) scores[lane_of_token(t)] += bias[t];
            }
            if (s.softcap != 0) cap_scores(scores, stride, s.softcap);
            for (int64_t t = tokens; t < stride; ++t) scores[lane_of_token(t)] = UNSEEN;
            base[r] = 0;
            step[r] = 1;
        }
    }

    // Scores to what they say about their page, four rows at a time. STRIDE is `stride`; 0: any number.
    template <int STRIDE>
    void summarise(int64_t num_rows) {
        const int64_t vectors = (STRIDE ? STRIDE : stride) / 16;
        const float share = 1.0f / (float)s.layout.page_tokens;
        std::memset(lanes + num_rows * stride, 0,  // rows that fill up the last four
                    (size_t)((4 - num_rows % 4) % 4 * stride) * 4);
        Lanes x[4];
        for (int64_t r = 0; r < num_rows; r += 4) {
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
                const float *scores = lanes + (r + n) * vectors * 16;
                x[n] = load(scores);
                for (int64_t i = 1; i < vectors; ++i) x[n] = larger(x[n], load(scores + 16 * i));
            }
            largest_four(x[0], x[1], x[2], x[3], most + r);
        }
        for (int64_t r = 0; r < num_rows; r += 4) {
            Lanes per_step[4], top[4], weights[4];
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
                per_step[n] = all(step[r + n] * 1.44269504f);  // log2(e)
                top[n] = all(most[r + n]);
                x[n] = zero();
            }
            for (int64_t i = 0; i < vectors; ++i) {
                float *scores = lanes + (r * vectors + i) * 16;
                EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n)
                    weights[n] = mul(sub(load(scores + n * vectors * 16), top[n]), per_step[n]);
                exp2_all<4>(weights);
                EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
                    store(scores + n * vectors * 16, weights[n]);
                    x[n] = add(x[n], weights[n]);
                }
            }
            sum_four(x[0], x[1], x[2], x[3], total + r);
        }
        for (int64_t r = 0; r < num_rows; r += 4) {
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
                const float *weights = lanes + (r + n) * vectors * 16;
                const Lanes mean = all(total[r + n] * share);
                x[n] = zero();
                for (int64_t i = 0; i < vectors; ++i) x[n] = add(x[n], larger(sub(load(weights + 16 * i), mean), zero()));
            }
            sum_four(x[0], x[1], x[2], x[3], above + r);
        }
        // What is above the mean is as much as what is below.
        for (int64_t r = 0; r < num_rows; ++r) {
            base[r] += step[r] * most[r] + log_from_one(total[r]);
            above[r] /= total[r];
        }
    }

    template <int ROWS>
    void score(int64_t row) {
        measure<ROWS>(row);
        quantise<ROWS>();
        add_planes<ROWS>(row);
        if (s.bias || s.softcap != 0 || s.layout.page_tokens % 16) finish<ROWS>(row);
        stride == 64 ? summarise<64>(count * ROWS) : summarise<0>(count * ROWS);
        for (int64_t i = 0; i < count; ++i)
            for (int r = 0; r < ROWS; ++r) {
                const int64_t to = (blocks[i].head * s.rows + row + r) * s.num_pages + blocks[i].page;
                s.log_mass[to] = base[i * ROWS + r];
                s.unevenness[to] = above[i * ROWS + r];
            }
    }
};

// What one task needs to work in, in bytes.
int64_t score_scratch(const Layout &l) {
    const int64_t wide = whole_lanes(l.head_dim), stride = whole_lanes(l.page_tokens);
    return SCORE_BLOCKS * 4 * NearPlanes(l).elements + SCORED_AT_ONCE * 4 * (wide > stride ? wide : stride);
}

// One record's pages, all heads.
void score_record(const Score &s, int64_t record, uint8_t *scratch) {
    const NearPlanes near(s.layout);
    ScoredBlocks blocks(s, near, scratch);
    for (int64_t first = 0; first < s.layout.blocks_per_record(); first += blocks.count) {
        blocks.take(record, first);
        by_rows<SCORE_ROWS>(s.rows, [&](auto rows, int64_t row) { blocks.score<decltype(rows)::VALUE>(row); });
    }
}
