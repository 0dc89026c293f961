// Attention of query rows over tokens whose keys and values are held raw: full pages, the sink, the newest cells. Also
// what every attention ends with: scores to weights. Included inside an anonymous namespace, after lanes.h and pages.h.
//
// Rows are worked on ROW_BLOCK at a time, and what a row's numbers are added to is the same with any number of them.

inline int64_t whole_lanes(int64_t n) { return (n + 15) / 16 * 16; }

template <int N>
struct Constant {
    static constexpr int VALUE = N;
};

// Query rows and tokens whose sums registers hold together, and the lanes of an output row that they do.
#if defined(__AVX512F__)
constexpr int ROW_BLOCK = 4, TOKEN_BLOCK = 4, LANE_BLOCK = 4;
#elif defined(__AVX2__) || defined(EBBTIDE_NEON)
constexpr int ROW_BLOCK = 2, TOKEN_BLOCK = 2, LANE_BLOCK = 2;
#else
constexpr int ROW_BLOCK = 1, TOKEN_BLOCK = 1, LANE_BLOCK = 1;
#endif

// use(ROWS, r) for blocks of at most MOST rows, ROWS a constant.
template <int MOST, typename Use>
inline void by_rows(int64_t rows, const Use &use) {
    constexpr int THREE = MOST > 3 ? 3 : 1, TWO = MOST > 2 ? 2 : 1;
    int64_t r = 0;
    for (; r + MOST <= rows; r += MOST) use(Constant<MOST>(), r);
    if (THREE == 3 && rows - r == 3) return use(Constant<THREE>(), r);
    if (TWO == 2 && rows - r == 2) return use(Constant<TWO>(), r);
    if (r < rows) use(Constant<1>(), r);
}

template <int MOST>
inline int64_t num_row_blocks(int64_t rows) {
    return (rows + MOST - 1) / MOST;
}

constexpr int64_t LINE_BYTES = 64;  // what memory sends at a time

// Asks for bytes that are read soon.
inline void ask_for(const uint8_t *from, int64_t bytes) {
    for (int64_t j = 0; j < bytes; j += LINE_BYTES) __builtin_prefetch(from + j, 0, 2);
}

// Asks for bytes little by little, beside computing: a core waits for some twenty lines at a time, and whoever asks for more at
// once stands still until they are there.
class Ahead {
public:
    Ahead() = default;
    Ahead(const uint8_t *from, int64_t bytes, const uint8_t *then = nullptr, int64_t then_bytes = 0)
        : next_(from), end_(from + bytes), then_(then), then_end_(then + then_bytes) {}

    // All is asked for after so many calls of step.
    void spread_over(int64_t steps) {
        const int64_t lines = (end_ - next_ + LINE_BYTES - 1) / LINE_BYTES + (then_end_ - then_ + LINE_BYTES - 1) / LINE_BYTES;
        lines_a_step_ = (lines + steps - 1) / steps;
    }
    void step() {
        for (int64_t n = 0; n < lines_a_step_ && next_ < end_; ++n) {
            __builtin_prefetch(next_, 0, 2);
            next_ += LINE_BYTES;
            if (next_ >= end_) {
                next_ = then_;
                end_ = then_end_;
                then_ = then_end_;
            }
        }
    }

private:
    const uint8_t *next_ = nullptr, *end_ = nullptr, *then_ = nullptr, *then_end_ = nullptr;
    int64_t lines_a_step_ = 0;
};

// How far ahead of what is read: what follows a page's keys are its values, and what follows these the next head's keys.
// Pages of bf16 from memory are attended to at 0.65 of what products reach, and at 0.4 where the hardware has to foresee it.
constexpr int64_t AHEAD_BYTES = 8192;

struct FromF32 {
    static constexpr int64_t BYTES = 4;
    static Lanes lanes(const uint8_t *p) { return load((const float *)p); }
};
struct FromBF16 {
    static constexpr int64_t BYTES = 2;
    static Lanes lanes(const uint8_t *p) { return load_bf16(p); }
};
struct FromF16 {
    static constexpr int64_t BYTES = 2;
    static Lanes lanes(const uint8_t *p) { return load_f16(p); }
};

inline int64_t raw_row_bytes(RawKind kind, int64_t dim) { return dim * (kind == RAW_F32 ? 4 : 2); }

// scores[r * stride + t] = q[r].k[t] for ROWS rows and TOKENS tokens, `row_bytes` apart.
template <typename From, int ROWS, int TOKENS>
inline void score_tokens(const float *q, const uint8_t *k, int64_t row_bytes, int64_t wide, float *scores, int64_t stride) {
    Lanes acc[ROWS][TOKENS];
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) acc[r][t] = zero();
    for (int64_t j = 0; j < wide; j += 16) {
        Lanes key[TOKENS];
        for (int t = 0; t < TOKENS; ++t) key[t] = From::lanes(k + t * row_bytes + j * From::BYTES);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes query = load(q + r * wide + j);
            for (int t = 0; t < TOKENS; ++t) acc[r][t] = mul_add(query, key[t], acc[r][t]);
        }
    }
    float sums[4];
    if (TOKENS == 4) {
        for (int r = 0; r < ROWS; ++r) sum_four(acc[r][0], acc[r][1 % TOKENS], acc[r][2 % TOKENS], acc[r][3 % TOKENS], scores + r * stride);
    } else if (TOKENS == 2 && ROWS == 2) {
        sum_four(acc[0][0], acc[0][1 % TOKENS], acc[1 % ROWS][0], acc[1 % ROWS][1 % TOKENS], sums);
        std::memcpy(scores, sums, 8);
        std::memcpy(scores + (1 % ROWS) * stride, sums + 2, 8);
    } else {
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < TOKENS; ++t) scores[r * stride + t] = sum(acc[r][t]);
    }
}

template <typename From, int ROWS>
inline void score_run(const float *q, const uint8_t *k, int64_t row_bytes, int64_t wide, int64_t tokens, float *scores, int64_t stride) {
    int64_t t = 0;
    for (; t + TOKEN_BLOCK <= tokens; t += TOKEN_BLOCK) {
        ask_for(k + t * row_bytes + AHEAD_BYTES, TOKEN_BLOCK * row_bytes);
        score_tokens<From, ROWS, TOKEN_BLOCK>(q, k + t * row_bytes, row_bytes, wide, scores + t, stride);
    }
    for (; t < tokens; ++t) score_tokens<From, ROWS, 1>(q, k + t * row_bytes, row_bytes, wide, scores + t, stride);
}

// out[r * wide + 16 l ...] += sum of weights[r * stride + t] * v[t], in the order of tokens, for LANES times sixteen lanes.
// asked: bytes of each row to ask for ahead.
template <typename From, int ROWS, int LANES>
inline void add_values(const float *weights, int64_t stride, const uint8_t *v, int64_t row_bytes, int64_t tokens, int64_t wide, float *out,
                       int64_t asked) {
    Lanes acc[ROWS][LANES];
    for (int r = 0; r < ROWS; ++r)
        for (int l = 0; l < LANES; ++l) acc[r][l] = load(out + r * wide + 16 * l);
    for (int64_t t = 0; t < tokens; ++t, v += row_bytes) {
        ask_for(v + AHEAD_BYTES, asked);
        Lanes value[LANES];
        for (int l = 0; l < LANES; ++l) value[l] = From::lanes(v + 16 * l * From::BYTES);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes weight = all(weights[r * stride + t]);
            for (int l = 0; l < LANES; ++l) acc[r][l] = mul_add(weight, value[l], acc[r][l]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int l = 0; l < LANES; ++l) store(out + r * wide + 16 * l, acc[r][l]);
}

template <typename From, int ROWS>
inline void add_run(const float *weights, int64_t stride, const uint8_t *v, int64_t row_bytes, int64_t tokens, int64_t wide, float *out) {
    int64_t j = 0;
    for (; j + 16 * LANE_BLOCK <= wide; j += 16 * LANE_BLOCK)
        add_values<From, ROWS, LANE_BLOCK>(weights, stride, v + j * From::BYTES, row_bytes, tokens, wide, out + j, j ? 0 : row_bytes);
    for (; j < wide; j += 16)
        add_values<From, ROWS, 1>(weights, stride, v + j * From::BYTES, row_bytes, tokens, wide, out + j, j ? 0 : row_bytes);
}

// softcap * tanh(score / softcap) for every score. tanh(x) = (m - p) / (m + p), where p = exp(-2x) for x above 0, m =
// exp(2x) below, and the other is 1: within 2e-7 of tanh, and so a score within the rounding of one as large as the cap.
inline void cap_scores(float *row, int64_t n, float softcap) {
    for (int64_t t = 0; t < n; t += 16) {
        const Lanes twice = mul(load(row + t), all(2 / softcap)), down = sub(zero(), twice);
        const Lanes p = exp_lanes(sub(zero(), larger(twice, zero()))), m = exp_lanes(sub(zero(), larger(down, zero())));
        store(row + t, mul(divided(sub(m, p), add(m, p)), all(softcap)));
    }
}

// Scores first .. last - 1 of ROWS rows of `stride`, whole lanes, plus `bias` (null: none), to weights next to their greatest; the
// others to 0.
template <int ROWS>
inline void soften(float *rows, int64_t stride, int64_t first, int64_t last, const float *bias, int64_t bias_stride, float softcap,
                   float *highest, float *total) {
    for (int r = 0; r < ROWS; ++r) {
        float *row = rows + r * stride;
        if (bias)
            for (int64_t t = first; t < last; ++t) row[t] += bias[r * bias_stride + t];
        if (softcap != 0) {
            for (int64_t t = last; t < stride; ++t) row[t] = 0;
            cap_scores(row, stride, softcap);
        }
        for (int64_t t = 0; t < first; ++t) row[t] = UNSEEN;
        for (int64_t t = last; t < stride; ++t) row[t] = UNSEEN;
    }
    Lanes tops[ROWS], most[ROWS], along[ROWS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        tops[r] = all(UNSEEN);
        along[r] = zero();
    }
    for (int64_t t = 0; t < stride; t += 16)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) tops[r] = larger(tops[r], load(rows + r * stride + t));
    largest_each<ROWS>(tops, highest);
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) most[r] = all(highest[r]);
    for (int64_t t = 0; t < stride; t += 16)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            float *at = rows + r * stride + t;
            store(at, exp_lanes(sub(load(at), most[r])));
        }
    for (int r = 0; r < ROWS; ++r) {
        for (int64_t t = 0; t < first; ++t) rows[r * stride + t] = 0;
        for (int64_t t = last; t < stride; ++t) rows[r * stride + t] = 0;
    }
    for (int64_t t = 0; t < stride; t += 16)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) along[r] = add(along[r], load(rows + r * stride + t));
    sum_each<ROWS>(along, total);
}

// Rows of scores[rows][n], n in whole lanes, to weights next to their greatest, in place. What is below LEAST counts as none: a
// hidden key's weight must be nothing at all.
inline void soften_rows(float *scores, int64_t n, float *highest, float *total, int64_t rows) {
    const Lanes least = all(2e-38f);  // ../attention.py's LEAST_WEIGHT; exp_lanes ends at 1.6e-38
    for (int64_t r = 0; r < rows; ++r) {
        float *row = scores + r * n;
        Lanes tops = all(UNSEEN), along = zero();
        for (int64_t t = 0; t < n; t += 16) tops = larger(tops, load(row + t));
        highest[r] = largest(tops);
        const Lanes most = all(highest[r]);
        for (int64_t t = 0; t < n; t += 16) {
            const Lanes weight = larger(sub(exp_lanes(sub(load(row + t), most)), least), zero());
            store(row + t, weight);
            along = add(along, weight);
        }
        total[r] = sum(along);
    }
}

// What attending to runs takes to work in, in floats.
inline int64_t runs_scratch(int64_t dim, int64_t rows, int64_t tokens) {
    return rows * (whole_lanes(tokens) + 2 * whole_lanes(dim)) + (dim % 16 ? ROW_BLOCK * TOKEN_BLOCK * 16 * whole_lanes(dim) : 0);
}

// Calls use(From, data, row_bytes, first, tokens) for the keys or values of a run. Where head_dim is no whole number of
// lanes it does so for some tokens at a time, which are widened to floats with zeros behind them: reading on would
// read what is not the token's.
template <typename Use>
inline void with_run(RawKind kind, int64_t dim, const uint8_t *data, int64_t tokens, float *block, const Use &use) {
    const int64_t wide = whole_lanes(dim), row_bytes = raw_row_bytes(kind, dim);
    if (dim == wide) {
        switch (kind) {
            case RAW_F32: return use(FromF32(), data, row_bytes, 0, tokens);
            case RAW_F16: return use(FromF16(), data, row_bytes, 0, tokens);
            default: return use(FromBF16(), data, row_bytes, 0, tokens);
        }
    }
    constexpr int64_t MOST = ROW_BLOCK * TOKEN_BLOCK * 16;
    for (int64_t at = 0; at < tokens; at += MOST) {
        const int64_t count = tokens - at < MOST ? tokens - at : MOST;
        for (int64_t t = 0; t < count; ++t) {
            read_raw(kind, data + (at + t) * row_bytes, dim, block + t * wide);
            std::memset(block + t * wide + dim, 0, (size_t)(wide - dim) * 4);
        }
        use(FromF32(), (const uint8_t *)block, wide * 4, at, count);
    }
}

// The partial of `rows` rows q[rows][dim] over all tokens of some runs: highest[rows], total[rows], out[rows][dim]. A row's
// bias is bias[r * bias_stride + t], or bias is null.
void attend_runs(RawKind kind, int64_t dim, int64_t rows, const float *q, const RawRun *runs, int64_t num_runs,
                 const float *bias, int64_t bias_stride, float softcap, float *scratch, float *highest, float *total, float *out) {
    const int64_t wide = whole_lanes(dim);
    int64_t tokens = 0;
    for (int64_t i = 0; i < num_runs; ++i) tokens += runs[i].tokens;
    const int64_t stride = whole_lanes(tokens);
    float *scores = scratch, *queries = scores + rows * stride, *sums = queries + rows * wide, *block = sums + rows * wide;
    std::memset(queries, 0, (size_t)(2 * rows * wide) * 4);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(queries + r * wide, q + r * dim, (size_t)dim * 4);
    if (!tokens) {
        for (int64_t r = 0; r < rows; ++r) highest[r] = UNSEEN, total[r] = 0;
        std::memset(out, 0, (size_t)(rows * dim) * 4);
        return;
    }
    int64_t done = 0;
    for (int64_t i = 0; i < num_runs; done += runs[i++].tokens)
        with_run(kind, dim, runs[i].keys, runs[i].tokens, block,
                 [&](auto from, const uint8_t *k, int64_t row_bytes, int64_t first, int64_t count) {
                     typedef decltype(from) From;
                     float *to = scores + done + first;
                     by_rows<ROW_BLOCK>(rows, [&](auto block_rows, int64_t r) {
                         score_run<From, decltype(block_rows)::VALUE>(queries + r * wide, k, row_bytes, wide, count,
                                                                      to + r * stride, stride);
                     });
                 });
    by_rows<ROW_BLOCK>(rows, [&](auto count, int64_t r) {
        soften<decltype(count)::VALUE>(scores + r * stride, stride, 0, tokens, bias ? bias + r * bias_stride : nullptr, bias_stride,
                                       softcap, highest + r, total + r);
    });
    done = 0;
    for (int64_t i = 0; i < num_runs; done += runs[i++].tokens)
        with_run(kind, dim, runs[i].values, runs[i].tokens, block,
                 [&](auto from, const uint8_t *v, int64_t row_bytes, int64_t first, int64_t count) {
                     typedef decltype(from) From;
                     const float *weights = scores + done + first;
                     by_rows<ROW_BLOCK>(rows, [&](auto block_rows, int64_t r) {
                         add_run<From, decltype(block_rows)::VALUE>(weights + r * stride, stride, v, row_bytes, count, wide,
                                                                    sums + r * wide);
                     });
                 });
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * dim, sums + r * wide, (size_t)dim * 4);
}

// The raw tokens of a step, one head: each head's runs lie apart.
int64_t raw_scratch(const RawAttend &a) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < a.num_runs; ++i) tokens += a.runs[i].tokens;
    return runs_scratch(a.head_dim, a.rows, tokens);
}
void attend_raw(const RawAttend &a, int64_t head, float *scratch, float *highest, float *total, float *out) {
    RawRun runs[MAX_RUNS];
    for (int64_t i = 0; i < a.num_runs; ++i) {
        runs[i] = a.runs[i];
        runs[i].keys += head * runs[i].head_bytes;
        runs[i].values += head * runs[i].head_bytes;
    }
    attend_runs(a.kind, a.head_dim, a.rows, a.q + head * a.rows * a.head_dim, runs, a.num_runs, nullptr, 0, a.softcap, scratch,
                highest, total, out);
    if (!a.null_scores) return;
    float nothing[MAX_DIM] = {0};
    for (int64_t r = 0; r < a.rows; ++r) {
        float score = a.null_scores[head * a.rows + r], one = 1;
        join({highest + r, total + r, out + r * a.head_dim}, {&score, &one, nothing}, 1, a.head_dim);
    }
}
