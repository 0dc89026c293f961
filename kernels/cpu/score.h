// What the near plane says about each page (../score.py has the formulas). Included inside an anonymous namespace, after
// pages.h, attend.h (cap_scores) and codes.h.

constexpr int64_t SCORE_ROWS = 4;  // query rows worked on together: codes are unpacked once for all of them

// How one plane of near codes is read: in place, or, where its tokens do not lie evenly, from padded copies.
struct NearPlane {
    int64_t offset, run;
    int width;
};
struct NearPlanes {
    NearPlane planes[2];  // of at most four bits
    int count = 0;
    bool in_place = true;
    int64_t query_bytes = 0;  // of one row, arranged for every plane

    explicit NearPlanes(const Layout &l) {
        for_planes(l.near_bits, l.page_tokens, l.head_dim, [&](int width, int, int64_t offset) {
            const int64_t run = l.head_dim * width / 8;
            in_place = in_place && fits_bits(run, l.page_tokens);
            planes[count++] = {offset, run, width};
        });
        if (count && !in_place) {
            planes[0] = {0, (l.head_dim + 63) / 64 * 64, 8};
            count = 1;
        }
        for (int i = 0; i < count; ++i) query_bytes += arranged_bytes(planes[i].run, planes[i].width);
    }
};

// What one task needs to work in, in bytes.
int64_t score_scratch(const Layout &l, int64_t rows) {
    const int64_t run = (l.head_dim + 63) / 64 * 64;
    return rows * (NearPlanes(l).query_bytes + 4 * whole_lanes(l.page_tokens)) + 16 * run;
}

// A row's query times the bins' widths, as whole numbers of at most 127 steps each.
struct RowScale {
    float base, step;
};

// Fills whole[dim] and returns the step, and the score of a key in the middle of every bin but for the codes.
inline RowScale quantise_query(const float *q, const float *middle, const float *width, int64_t wide, float centre,
                               float *steps, int8_t *whole_steps) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: a sum with it is rounded to a whole number
    Lanes along = zero(), most = zero(), count = zero();
    for (int64_t j = 0; j < wide; j += 16) {
        const Lanes query = load(q + j), in_bins = mul(query, load(width + j));
        along = mul_add(query, load(middle + j), along);
        most = larger(most, larger(in_bins, sub(zero(), in_bins)));
        store(steps + j, in_bins);
    }
    const float greatest = largest(most), scale = greatest > 1e-30f ? 1.0f / greatest * 127.0f : 0.0f;
    for (int64_t j = 0; j < wide; j += 16) {
        const Lanes rounded = add(mul(load(steps + j), all(scale)), all(ROUND));
        store_low_bytes(whole_steps + j, rounded);
        count = add(count, sub(rounded, all(ROUND)));
    }
    const float step = greatest / 127.0f;
    return {sum(along) - step * centre * sum(count), step};
}

// scores[r * stride + t] += (scores so far << width) + sum of code * q[r] for every token of a plane, ROWS rows.
template <int WIDTH, int ROWS>
inline void score_plane(const uint8_t *plane, int64_t run, int64_t tokens, const int8_t *q, int64_t query_bytes,
                        bool first, float *scores, int64_t stride) {
    Ints sums[ROWS];
    for (int64_t t = 0; t < tokens; t += 16) {
        dot_sixteen<WIDTH, ROWS>(plane + t * run, run, q, query_bytes, sums);
        for (int r = 0; r < ROWS; ++r) {
            float *to = scores + r * stride + t;
            const Lanes lanes = to_lanes(sums[r]);
            store(to, first ? lanes : mul_add(load(to), all((float)(1 << WIDTH)), lanes));
        }
    }
}

template <int ROWS>
inline void score_plane(int width, const uint8_t *plane, int64_t run, int64_t tokens, const int8_t *q,
                        int64_t query_bytes, bool first, float *scores, int64_t stride) {
    switch (width) {
        case 1: return score_plane<1, ROWS>(plane, run, tokens, q, query_bytes, first, scores, stride);
        case 2: return score_plane<2, ROWS>(plane, run, tokens, q, query_bytes, first, scores, stride);
        case 4: return score_plane<4, ROWS>(plane, run, tokens, q, query_bytes, first, scores, stride);
        default: return score_plane<8, ROWS>(plane, run, tokens, q, query_bytes, first, scores, stride);
    }
}

// The scores of one row to what they say about the page.
inline void summarise(const Score &s, const RowScale &scale, const float *bias, float *row, float *log_mass,
                      float *unevenness) {
    const int64_t tokens = s.layout.page_tokens, stride = whole_lanes(tokens);
    for (int64_t t = 0; t < stride; t += 16) store(row + t, mul_add(load(row + t), all(scale.step), all(scale.base)));
    if (bias)
        for (int64_t t = 0; t < tokens; ++t) row[t] += bias[t];
    if (s.softcap != 0) cap_scores(row, stride, s.softcap);
    for (int64_t t = tokens; t < stride; ++t) row[t] = UNSEEN;
    Lanes tops = all(UNSEEN), along = zero(), apart = zero();
    for (int64_t t = 0; t < stride; t += 16) tops = larger(tops, load(row + t));
    const float most = largest(tops);
    for (int64_t t = 0; t < stride; t += 16) store(row + t, exp_lanes(sub(load(row + t), all(most))));
    for (int64_t t = tokens; t < stride; ++t) row[t] = 0;
    for (int64_t t = 0; t < stride; t += 16) along = add(along, load(row + t));
    const float total = sum(along), mean = total / (float)tokens;
    for (int64_t t = tokens; t < stride; ++t) row[t] = mean;
    for (int64_t t = 0; t < stride; t += 16) {
        const Lanes over = sub(load(row + t), all(mean));
        apart = add(apart, larger(over, sub(zero(), over)));
    }
    *log_mass = most + std::log(total);
    *unevenness = sum(apart) / (2 * total);
}

// One record's pages, all heads.
void score_record(const Score &s, int64_t record, uint8_t *scratch) {
    const Layout &l = s.layout;
    const NearPlanes near(l);
    const int64_t dim = l.head_dim, wide = whole_lanes(dim), rows = s.rows, tokens = l.page_tokens;
    const int64_t stride = whole_lanes(tokens), padded = (dim + 63) / 64 * 64;
    const float centre = (float)((1 << l.near_bits) - 1) / 2, half_box = (float)((1 << l.key_bits) - 1) / 2;
    const float bin = (float)(1 << l.far_key_bits());
    float middle[MAX_DIM], width[MAX_DIM], steps[MAX_DIM];
    int8_t whole_steps[MAX_DIM];
    RowScale scales[SCORE_ROWS];
    float *scores = (float *)scratch;
    uint8_t *copies = scratch + rows * stride * 4;
    int8_t *queries = (int8_t *)copies + 16 * padded;
    if (!near.in_place) std::memset(copies, 0, (size_t)(16 * padded));  // lanes beyond dim stay 0
    std::memset(width, 0, sizeof width);
    std::memset(middle, 0, sizeof middle);

    for (int64_t i = 0; i < l.blocks_per_record(); ++i) {
        const int64_t page = record * l.pages_per_record + i / l.kv_heads, head = i % l.kv_heads;
        const uint8_t *block = s.near[record] + i * l.near_head_bytes;
        load_halves(block + l.key_min_offset, dim, middle);
        load_halves(block + l.key_min_offset + 2 * dim, dim, width);
        for (int64_t j = 0; j < wide; j += 16) {
            store(middle + j, mul_add(load(width + j), all(half_box), load(middle + j)));
            store(width + j, mul(load(width + j), all(bin)));
        }
        for (int64_t r0 = 0; r0 < rows; r0 += SCORE_ROWS) {
            const int64_t count = rows - r0 < SCORE_ROWS ? rows - r0 : SCORE_ROWS;
            for (int64_t r = 0; r < count; ++r) {
                const float *q = s.q + (head * rows + r0 + r) * wide;
                scales[r] = quantise_query(q, middle, width, wide, centre, steps, whole_steps);
                int8_t *to = queries + r * near.query_bytes;
                for (int p = 0; p < near.count; ++p) {
                    if (!near.in_place) {
                        std::memset(to, 0, (size_t)padded);
                        std::memcpy(to, whole_steps, (size_t)dim);
                        continue;
                    }
                    arrange_query(whole_steps, near.planes[p].run, near.planes[p].width, to);
                    to += arranged_bytes(near.planes[p].run, near.planes[p].width);
                }
            }
            if (!near.count) std::memset(scores, 0, (size_t)(count * stride) * 4);
            const int8_t *q = queries;
            for (int p = 0; p < near.count; ++p) {
                const NearPlane &plane = near.planes[p];
                if (near.in_place) {
                    if (count == SCORE_ROWS)
                        score_plane<SCORE_ROWS>(plane.width, block + plane.offset, plane.run, tokens, q,
                                                near.query_bytes, p == 0, scores, stride);
                    else
                        for (int64_t r = 0; r < count; ++r)
                            score_plane<1>(plane.width, block + plane.offset, plane.run, tokens,
                                           q + r * near.query_bytes, near.query_bytes, p == 0, scores + r * stride,
                                           stride);
                    q += arranged_bytes(plane.run, plane.width);
                    continue;
                }
                CodeReader reader(dim);
                reader.add(block, l.near_bits, tokens, 0);
                for (int64_t t = 0; t < tokens; t += 16) {
                    for (int64_t n = 0; n < 16 && t + n < tokens; ++n) reader.read(t + n, copies + n * padded);
                    for (int64_t r = 0; r < count; ++r)
                        score_plane<8, 1>(copies, padded, 16, q + r * near.query_bytes, near.query_bytes, true,
                                          scores + r * stride + t, stride);
                }
            }
            for (int64_t r = 0; r < count; ++r) {
                const int64_t row = head * rows + r0 + r, at = row * s.num_pages + page;
                const float *bias = s.bias ? s.bias + row * s.num_tokens + page * tokens : nullptr;
                summarise(s, scales[r], bias, scores + r * stride, s.log_mass + at, s.unevenness + at);
            }
        }
    }
}
