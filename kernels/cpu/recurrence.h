// Layers that keep a state of fixed size: short convolutions, matrices that every token adds to, and Mamba's selective scan;
// ../recurrence.py and ../scan.py say what they compute. Included inside an anonymous namespace, after step.h.
//
//     prepare_part   a head's queries, keys or values of all tokens, convolved; with values, the head's decays and weights
//     take_tokens    some columns of a head's matrix through all tokens, in a near cache: columns do not touch each other
//     gate_outputs   norms and gates
//
// Every sum has an order that shapes alone fix, and no token looks at a later one: its bits depend on no cut.

// Channels first .. first + count - 1 of all tokens to `out`, rows `stride` floats apart: finish(sums, token, channel - first).
// Then the last inputs.
template <typename Finish>
inline void convolve(const Convolution &c, int64_t first, int64_t count, float *out, int64_t stride, const Finish &finish) {
    const float *seen[MAX_CONV_WIDTH];
    for (int64_t t = 0; t < c.tokens; ++t) {
        for (int64_t k = 0; k < c.width; ++k) seen[k] = c.input(t + k) + first;
        for (int64_t j = 0; j < count; j += 16) {
            const int64_t left = count - j;
            Lanes sums = c.bias ? load_some(c.bias + first + j, left) : zero();
            for (int64_t k = 0; k < c.width; ++k)
                sums = mul_add(load_some(seen[k] + j, left), load_some(c.taps + k * c.channels + first + j, left), sums);
            store_some(out + t * stride + j, finish(sums, t, j), left);
        }
    }
    // Upwards, as each comes from a later place where `after` is `before`.
    for (int64_t k = 0; k < c.width - 1; ++k)
        std::memmove(c.after + k * c.channels + first, c.input(c.tokens + k) + first, (size_t)count * sizeof(float));
}

// A part's convolved tokens, one after the other.
inline float *convolve_part(const Recurrence &r, int64_t first, int64_t dim) {
    convolve(r.conv, first, dim, r.part(first), dim, [](Lanes sums, int64_t, int64_t) { return silu(sums); });
    return r.part(first);
}

// exp(-60). What is left below is nothing beside what a token adds, and makes numbers so small that some processors take a hundred
// times as long for them.
constexpr float LEAST_DECAY = 8.7565108e-27f;

inline void to_length(float *x, int64_t n, float length) {
    constexpr float EPS = 1e-6f;  // ../recurrence.py's
    const float factor = length / std::sqrt(sum_of_squares(x, n) + EPS);
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

inline float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// A token's decay of each number of a head's keys.
inline void decay_channels(const Recurrence &r, int64_t head, const float *steps, float *decays) {
    const float *bias = r.step_bias + head * r.key_dim;
    const Lanes rate = all(r.rate[head]);
    for (int64_t j = 0; j < r.key_dim; j += 16) {
        const int64_t left = r.key_dim - j;
        const Lanes step = add(load_some(steps + j, left), load_some(bias + j, left));
        const Lanes logs = r.least_log_decay < 0 ? mul(all(r.least_log_decay), sigmoid(sub(zero(), mul(rate, step))))
                                                 : mul(rate, softplus(step));
        store_some(decays + j, exp_lanes(logs), left);
    }
    for (int64_t j = 0; j < r.key_dim; ++j) {
        const float step = steps[j] + bias[j];
        if (decays[j] < LEAST_DECAY) decays[j] = 0.0f;
        if (step != step) decays[j] = step;  // what is no number stays none
    }
}

inline float gain_of(const Recurrence &r, int64_t token, int64_t head) {
    return r.most_gain / (1 + std::exp(-r.gains[token * r.gains_stride + head]));
}

// A head's decays, and what its new values are multiplied by.
inline void weigh_tokens(const Recurrence &r, int64_t head) {
    const int64_t n = r.conv.tokens;
    if (r.by_channel) {
        for (int64_t t = 0; t < n; ++t) {
            r.weights[head * n + t] = gain_of(r, t, head);
            decay_channels(r, head, r.steps + t * r.steps_stride + head * r.key_dim, r.decays + (head * n + t) * r.key_dim);
        }
        return;
    }
    for (int64_t t = 0; t < n; ++t) {
        float step = softplus(r.steps[t * r.steps_stride + head] + r.step_bias[head]);
        if (!r.is_delta) step = step < r.least_step ? r.least_step : step > r.most_step ? r.most_step : step;
        r.weights[head * n + t] = r.is_delta ? gain_of(r, t, head) : step;
        const float exponent = step * r.rate[head];
        r.decays[head * n + t] = exponent < -60.0f ? 0.0f : std::exp(exponent);  // see LEAST_DECAY
    }
}

void prepare_part(const Recurrence &r, int64_t part) {
    if (part < r.heads) {
        convolve_part(r, r.values(part), r.value_dim);
        return weigh_tokens(r, part);
    }
    const int64_t head = (part - r.heads) / 2, dim = r.key_dim;
    const bool is_key = (part - r.heads) % 2;
    float *x = convolve_part(r, is_key ? r.keys(head) : r.queries(head), dim);
    if (!r.is_delta) return;
    const float length = is_key ? 1.0f : 1.0f / std::sqrt((float)dim);
    for (int64_t t = 0; t < r.conv.tokens; ++t) to_length(x + t * dim, dim, length);
}

// Lanes of columns that go together: as many sums as registers hold. Wide rows are worth it where one token reads the whole
// matrix from memory: 128 columns take half the time of four times 32.
#if defined(__AVX512F__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif

// add_row(row, sums) for rows 0 .. rows - 1, to `total`. Narrow ones have two sums by turns, as each addition waits for the one
// before.
template <int LANES, typename AddRow>
EBBTIDE_INLINED void over_rows(int64_t rows, Lanes *total, const AddRow &add_row) {
    constexpr int CHAINS = LANES < WIDEST ? 2 : 1;
    Lanes sums[CHAINS][LANES];
    EBBTIDE_UNROLLED for (int c = 0; c < CHAINS; ++c)
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) sums[c][l] = zero();
    int64_t i = 0;
    for (; i + CHAINS <= rows; i += CHAINS)
        EBBTIDE_UNROLLED for (int c = 0; c < CHAINS; ++c) add_row(i + c, sums[c]);
    for (; i < rows; ++i) add_row(i, sums[0]);
    EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) total[l] = CHAINS == 1 ? sums[0][l] : add(sums[0][l], sums[CHAINS - 1][l]);
}

// Some columns of a head's matrix, rows `stride` floats apart.
struct Columns {
    float *at;
    int64_t stride;

    float *row(int64_t i) const { return at + i * stride; }
    void copy_to(const Columns &to, int64_t rows, int64_t count) const {
        for (int64_t i = 0; i < rows; ++i) std::memmove(to.row(i), row(i), (size_t)count * sizeof(float));
    }
};

// One token: `to` becomes `from`, decayed, and what the token adds; out: what the token's query finds there. decay: one, or one for
// each row.
template <int LANES, bool BY_CHANNEL>
EBBTIDE_INLINED void take_token(bool is_delta, int64_t key_dim, const float *q, const float *k, const Lanes *v, const float *decay,
                                float weight, const Columns &from, const Columns &to, Lanes *out) {
    const Lanes kept_of_all = all(*decay);
    Lanes added[LANES];
    EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) added[l] = v[l];
    if (is_delta) {
        Lanes known[LANES];
        over_rows<LANES>(key_dim, known, [&](int64_t i, Lanes *sums) __attribute__((always_inline)) {
            const Lanes key = all(BY_CHANNEL ? k[i] * decay[i] : k[i]);
            EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) sums[l] = mul_add(key, load(from.row(i) + 16 * l), sums[l]);
        });
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) added[l] = sub(v[l], BY_CHANNEL ? known[l] : mul(kept_of_all, known[l]));
    }
    EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) added[l] = mul(all(weight), added[l]);
    over_rows<LANES>(key_dim, out, [&](int64_t i, Lanes *sums) __attribute__((always_inline)) {
        const Lanes key = all(k[i]), query = all(q[i]), kept = BY_CHANNEL ? all(decay[i]) : kept_of_all;
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) {
            const Lanes row = mul_add(key, added[l], mul(kept, load(from.row(i) + 16 * l)));
            store(to.row(i) + 16 * l, row);
            sums[l] = mul_add(query, row, sums[l]);
        }
    });
}

// Columns first .. first + count - 1 of a head through all tokens; count fills all lanes but some of the last vector's. The first
// token reads them where they were and the last one writes them where they shall be, so that a single token moves them once. Those
// of a vector that is not full lie elsewhere in between, with zeros beside them.
template <int LANES, bool BY_CHANNEL>
inline void take_columns(const Recurrence &r, int64_t head, int64_t first, int64_t count, float *scratch) {
    const int64_t n = r.conv.tokens, matrix = head * r.key_dim * r.value_dim + first, key_head = head * r.key_heads / r.heads;
    const bool is_full = count == 16 * LANES;
    const Columns before{const_cast<float *>(r.before) + matrix, r.value_dim}, after{r.after + matrix, r.value_dim};
    const Columns within{scratch, 16 * LANES};
    Columns from = before;
    if (!is_full) {
        std::memset(scratch, 0, (size_t)(r.key_dim * within.stride) * sizeof(float));
        before.copy_to(within, r.key_dim, count);
        from = within;
    }
    const float *q = r.part(r.queries(key_head)), *k = r.part(r.keys(key_head)), *v = r.part(r.values(head)) + first;
    const Lanes skip = all(r.skip ? r.skip[head] : 0.0f);
    float *out = r.out + head * r.value_dim + first;
    for (int64_t t = 0; t < n; ++t, q += r.key_dim, k += r.key_dim, v += r.value_dim, out += r.heads * r.value_dim) {
        const Columns &to = is_full && t == n - 1 ? after : within;
        Lanes values[LANES], found[LANES];
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) values[l] = load_some(v + 16 * l, count - 16 * l);
        const float *decay = r.decays + (head * n + t) * r.decay_dim();
        take_token<LANES, BY_CHANNEL>(r.is_delta, r.key_dim, q, k, values, decay, r.weights[head * n + t], from, to, found);
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l)
            store_some(out + 16 * l, mul_add(skip, values[l], found[l]), count - 16 * l);
        from = to;
    }
    if (from.at != after.at) from.copy_to(after, r.key_dim, count);
}

template <bool BY_CHANNEL>
inline void take_some(const Recurrence &r, int64_t head, int64_t first, float *scratch) {
    const int64_t end = first + RECUR_COLUMNS < r.value_dim ? first + RECUR_COLUMNS : r.value_dim;
    for (int64_t count; first < end; first += count) {
        const int64_t left = end - first;
        count = left >= 16 * WIDEST ? 16 * WIDEST : left >= 64 ? 64 : left >= 32 ? 32 : left;
        if (count > 64) {
            take_columns<WIDEST, BY_CHANNEL>(r, head, first, count, scratch);
        } else if (count > 32) {
            take_columns<4, BY_CHANNEL>(r, head, first, count, scratch);
        } else if (count > 16) {
            take_columns<2, BY_CHANNEL>(r, head, first, count, scratch);
        } else {
            take_columns<1, BY_CHANNEL>(r, head, first, count, scratch);
        }
    }
}

// Up to RECUR_COLUMNS of a head's columns, from `first` on.
void take_tokens(const Recurrence &r, int64_t head, int64_t first, float *scratch) {
    r.by_channel ? take_some<true>(r, head, first, scratch) : take_some<false>(r, head, first, scratch);
}

// DeltaNet norms before it gates, Mamba-2 gates before it norms.
void gate_outputs(const Recurrence &r, int64_t begin, int64_t end) {
    const int64_t width = r.norm_heads * r.value_dim, groups = r.heads / r.norm_heads;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / groups, group = i % groups;
        const float *gate = r.gate + token * r.gate_stride + group * width;
        float *x = r.out + i * width;
        if (!r.is_delta) gate_lanes<silu>(gate, x, width, x);
        const float factor = inverse_rms(x, r.norm_eps, width);
        for (int64_t h = 0; h < r.norm_heads; ++h) {
            float *of_head = x + h * r.value_dim;
            weigh(of_head, factor, r.norm + (group * r.norm_heads + h) * r.norm_stride, 0.0f, r.value_dim, of_head);
        }
        if (r.by_channel)
            gate_lanes<sigmoid>(gate, x, width, x);
        else if (r.is_delta)
            gate_lanes<silu>(gate, x, width, x);
    }
}

void short_conv(const ShortConvolution &s, int64_t begin, int64_t end) {
    const int64_t channels = s.conv.channels, count = end - begin;
    for (int64_t t = 0; t < s.conv.tokens; ++t) {
        const float *b = s.mixed + t * s.stride + begin, *x = b + 2 * channels;
        float *product = s.products + t * channels + begin;
        for (int64_t j = 0; j < count; ++j) product[j] = b[j] * x[j];
    }
    convolve(s.conv, begin, count, s.out + begin, channels, [&](Lanes sums, int64_t t, int64_t j) {
        return mul(load_some(s.mixed + t * s.stride + channels + begin + j, count - j), sums);
    });
}

void silu_conv(const Convolution &c, float *out, int64_t begin, int64_t end) {
    convolve(c, begin, end - begin, out + begin, c.channels, [](Lanes sums, int64_t, int64_t) { return silu(sums); });
}

// LANES vectors of channels through all tokens. Each token adds to each number of a state, so none becomes so small that processors
// take long for it, as LEAST_DECAY is for. Rows of a state lie apart by what often is a multiple of 4096 bytes, of which a near
// cache holds few: rates and states are worked on side by side.
template <int LANES>
inline void scan_channels(const Scan &s, int64_t first, int64_t count, float *scratch) {
    constexpr int64_t WIDTH = 16 * LANES;
    float *rates = scratch, *states = scratch + s.dim * WIDTH;
    const Columns before{const_cast<float *>(s.before) + first, s.channels}, after{s.after + first, s.channels};
    if (count < WIDTH) std::memset(scratch, 0, (size_t)(2 * s.dim * WIDTH) * sizeof(float));
    Columns{const_cast<float *>(s.rate) + first, s.channels}.copy_to({rates, WIDTH}, s.dim, count);
    before.copy_to({states, WIDTH}, s.dim, count);
    for (int64_t t = 0; t < s.tokens; ++t) {
        const float *x = s.x + t * s.x_stride + first, *steps = s.steps + t * s.steps_stride + first;
        const float *keys = s.keys + t * s.keys_stride, *queries = s.queries + t * s.queries_stride;
        const float *gate = s.gate + t * s.gate_stride + first;
        Lanes step[LANES], added[LANES], found[LANES];
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) {
            const Lanes value = load_some(x + 16 * l, count - 16 * l);
            step[l] = softplus(load_some(steps + 16 * l, count - 16 * l));
            added[l] = mul(step[l], value);
            found[l] = mul(load_some(s.skip + first + 16 * l, count - 16 * l), value);
        }
        for (int64_t i = 0; i < s.dim; ++i) {
            const Lanes key = all(keys[i]), query = all(queries[i]);
            EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l) {
                float *state = states + i * WIDTH + 16 * l;
                const Lanes kept = exp_lanes(mul(step[l], load(rates + i * WIDTH + 16 * l)));
                const Lanes now = mul_add(kept, load(state), mul(key, added[l]));
                store(state, now);
                found[l] = mul_add(query, now, found[l]);
            }
        }
        float *out = s.out + t * s.channels + first;
        EBBTIDE_UNROLLED for (int l = 0; l < LANES; ++l)
            store_some(out + 16 * l, mul(found[l], silu(load_some(gate + 16 * l, count - 16 * l))), count - 16 * l);
    }
    Columns{states, WIDTH}.copy_to(after, s.dim, count);
}

void scan(const Scan &s, int64_t first, float *scratch) {
    const int64_t left = s.channels - first;
    if (left >= 64) return scan_channels<4>(s, first, 64, scratch);
    for (const int64_t end = s.channels; first < end; first += 16)
        scan_channels<1>(s, first, end - first < 16 ? end - first : 16, scratch);
}
