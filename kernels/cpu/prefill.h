// Attention of many query rows over a run of float32 keys and values: what a prefill cell does, in two steps.
// Included inside an anonymous namespace, after lanes.h and runs.h.
//
//     pack_panel     every panel of keys, PANEL tokens wide, to [head_dim][PANEL], so that tokens are lanes; and values to rows
//                    of whole lanes, where they are not
//     attend_block   some rows of one head: scores, their softmax, and the sum of values, from caches
//
// Scores and sums are chains of multiply-adds in the order of channels and tokens, so a row's bits depend on no other row.

// Rows whose sums registers hold together, and the lanes beside them.
#if defined(__AVX512F__)
constexpr int CHAIN_ROWS = 6, CHAIN_LANES = 4;
#elif defined(__AVX2__) || defined(EBBTIDE_NEON)
constexpr int CHAIN_ROWS = 6, CHAIN_LANES = 1;
#else
constexpr int CHAIN_ROWS = 2, CHAIN_LANES = 1;
#endif
constexpr int64_t PANEL = 16 * CHAIN_LANES;
constexpr int64_t VALUE_TOKENS = 128;  // whose values the first cache holds while all rows of a block add them

inline int64_t num_panels(const PrefillAttend &a) { return (a.num_keys + PANEL - 1) / PANEL; }

// What the packed keys take, and, where head_dim is no whole number of lanes, values with zeros behind each.
int64_t prefill_floats(const PrefillAttend &a) {
    const int64_t tokens = num_panels(a) * PANEL, wide = whole_lanes(a.head_dim);
    return a.kv_heads * tokens * (a.head_dim + (wide == a.head_dim ? 0 : wide));
}

inline float *packed_values(const PrefillAttend &a, int64_t head) {
    const int64_t tokens = num_panels(a) * PANEL;
    return a.packed + a.kv_heads * tokens * a.head_dim + head * tokens * whole_lanes(a.head_dim);
}

int64_t prefill_panels(const PrefillAttend &a) { return a.kv_heads * num_panels(a); }

void pack_panel(const PrefillAttend &a, int64_t unit) {
    const int64_t dim = a.head_dim, wide = whole_lanes(dim), head = unit / num_panels(a), first = unit % num_panels(a) * PANEL;
    const int64_t count = a.num_keys - first < PANEL ? a.num_keys - first : PANEL;
    const float *keys = a.k + head * a.k_stride + first * dim;
    float *to = a.packed + unit * PANEL * dim;
    for (int64_t j = 0; j < dim; ++j, to += PANEL) {
        for (int64_t t = 0; t < count; ++t) to[t] = keys[t * dim + j];
        for (int64_t t = count; t < PANEL; ++t) to[t] = 0;
    }
    if (wide == dim) return;
    const float *values = a.v + head * a.v_stride + first * dim;
    float *copy = packed_values(a, head) + first * wide;
    for (int64_t t = 0; t < count; ++t) {
        std::memcpy(copy + t * wide, values + t * dim, (size_t)dim * 4);
        std::memset(copy + t * wide + dim, 0, (size_t)(wide - dim) * 4);
    }
}

// use(ROWS, r) for rows in blocks of CHAIN_ROWS, and the last ones in one of fewer.
template <typename Use>
inline void by_chain_rows(int64_t rows, const Use &use) {
    int64_t r = 0;
    for (; r + CHAIN_ROWS <= rows; r += CHAIN_ROWS) use(Constant<CHAIN_ROWS>(), r);
    switch (rows - r) {
        case 5: return use(Constant<5>(), r);
        case 4: return use(Constant<4>(), r);
        case 3: return use(Constant<3>(), r);
        case 2: return use(Constant<2>(), r);
        case 1: return use(Constant<1>(), r);
    }
}

// out[r][16 l ..] = start + sum over n of x[r][n] * y[n][16 l ..], for LANES times sixteen lanes; y's rows are y_row apart.
template <int ROWS, int LANES>
inline void add_chains(const float *x, int64_t x_row, const float *y, int64_t y_row, int64_t n, bool adds, float *out, int64_t out_row) {
    Lanes sums[ROWS][LANES];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) sums[r][l] = adds ? load(out + r * out_row + 16 * l) : zero();
    for (int64_t i = 0; i < n; ++i, y += y_row) {
        Lanes part[LANES];
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) part[l] = load(y + 16 * l);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            const Lanes factor = all(x[r * x_row + i]);
            EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) sums[r][l] = mul_add(factor, part[l], sums[r][l]);
        }
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) store(out + r * out_row + 16 * l, sums[r][l]);
}

// What one task needs to work in, in floats.
int64_t prefill_scratch(const PrefillAttend &a) {
    return PREFILL_ROWS * (num_panels(a) * PANEL + whole_lanes(a.head_dim));
}

// Rows first .. first + count - 1 of a head, at most PREFILL_ROWS.
void attend_block(const PrefillAttend &a, int64_t head, int64_t first, int64_t count, float *scratch) {
    const int64_t dim = a.head_dim, wide = whole_lanes(dim);
    float *highest = a.highest + head * a.rows + first, *total = a.total + head * a.rows + first;
    float *out = a.out + (head * a.rows + first) * dim;
    const auto seen = [&](int64_t r) { return a.mask + (first + r) % a.mask_rows * a.num_keys; };
    // What none of the rows sees, behind all that any does, would add nothing.
    int64_t keys = a.num_keys;
    if (a.mask) {
        keys = 0;
        for (int64_t r = 0; r < count; ++r) {
            int64_t last = a.num_keys;
            while (last > keys && !seen(r)[last - 1]) --last;
            keys = last;
        }
    }
    const int64_t panels = (keys + PANEL - 1) / PANEL, stride = panels * PANEL;
    float *scores = scratch, *sums = scores + count * stride;
    const float *q = a.q + (head * a.rows + first) * dim;
    for (int64_t p = 0; p < panels; ++p) {
        const float *panel = a.packed + (head * num_panels(a) + p) * PANEL * dim;
        by_chain_rows(count, [&](auto rows, int64_t r) {
            add_chains<decltype(rows)::VALUE, CHAIN_LANES>(q + r * dim, dim, panel, PANEL, dim, false, scores + r * stride + p * PANEL,
                                                             stride);
        });
    }
    for (int64_t r = 0; r < count; ++r) {
        float *row = scores + r * stride;
        if (a.softcap != 0) cap_scores(row, stride, a.softcap);
        if (a.mask) {
            const uint8_t *sees = seen(r);
            for (int64_t t = 0; t < keys; ++t) row[t] = sees[t] ? row[t] : UNSEEN;
        }
        for (int64_t t = keys; t < stride; ++t) row[t] = UNSEEN;
    }
    soften_rows(scores, stride, highest, total, keys ? count : 0);
    std::memset(sums, 0, (size_t)(count * wide) * 4);
    const float *values = wide == dim ? a.v + head * a.v_stride : packed_values(a, head);
    for (int64_t t = 0; t < keys; t += VALUE_TOKENS) {
        const int64_t tokens = keys - t < VALUE_TOKENS ? keys - t : VALUE_TOKENS;
        by_chain_rows(count, [&](auto rows, int64_t r) {
            constexpr int ROWS = decltype(rows)::VALUE;
            const float *weights = scores + r * stride + t;
            int64_t j = 0;
            for (; j + PANEL <= wide; j += PANEL)
                add_chains<ROWS, CHAIN_LANES>(weights, stride, values + t * wide + j, wide, tokens, true, sums + r * wide + j, wide);
            for (; j < wide; j += 16)
                add_chains<ROWS, 1>(weights, stride, values + t * wide + j, wide, tokens, true, sums + r * wide + j, wide);
        });
    }
    for (int64_t r = 0; r < count; ++r) {
        if (!keys || highest[r] == UNSEEN) {  // sees nothing
            highest[r] = UNSEEN;
            total[r] = 0;
            std::memset(sums + r * wide, 0, (size_t)wide * 4);
        }
        std::memcpy(out + r * dim, sums + r * wide, (size_t)dim * 4);
    }
}
