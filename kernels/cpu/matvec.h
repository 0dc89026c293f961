// Matrix-vector products with float32 sums. Each row is summed by several times sixteen lanes over its inputs in
// order, then over the lanes: an order that the number of inputs alone fixes.
//
// One row after the other, never several at once: a single stream of addresses reads at 0.93 of the ceiling, four rows
// side by side at 0.63 (an EPYC of the fourth generation), and software prefetches only slowed both.
// Included inside an anonymous namespace, after lanes.h and half.h.

struct LoadF32 {
    using Element = float;
    static Lanes lanes(const float *p) { return load(p); }
    static float one(float x) { return x; }
};
struct LoadBF16 {
    using Element = uint16_t;
    static Lanes lanes(const uint16_t *p) { return load_bf16(p); }
    static float one(uint16_t x) { return bf16_to_float(x); }
};
struct LoadF16 {
    using Element = uint16_t;
    static Lanes lanes(const uint16_t *p) { return load_f16(p); }
    static float one(uint16_t x) { return half_to_float(x); }
};

template <typename Load>
inline float float_row(const MatVec &m, int64_t row) {
    constexpr int CHAINS = 4;  // multiply-adds in flight
    const typename Load::Element *w = (const typename Load::Element *)m.weight + row * m.in;
    Lanes part[CHAINS] = {zero(), zero(), zero(), zero()};
    int64_t j = 0;
    for (; j + 16 * CHAINS <= m.in; j += 16 * CHAINS)
        for (int c = 0; c < CHAINS; ++c)
            part[c] = mul_add(Load::lanes(w + j + 16 * c), load(m.x + j + 16 * c), part[c]);
    for (; j + 16 <= m.in; j += 16) part[0] = mul_add(Load::lanes(w + j), load(m.x + j), part[0]);
    float total = sum(add(add(part[0], part[1]), add(part[2], part[3])));
    for (; j < m.in; ++j) total += Load::one(w[j]) * m.x[j];
    return total;
}

// A group's 32 weights, as two times sixteen lanes, still to be scaled.
struct GroupInt8 {
    static constexpr int64_t BYTES = GROUP;
    static void lanes(const uint8_t *p, Lanes &first, Lanes &second) {
        first = load_i8((const int8_t *)p);
        second = load_i8((const int8_t *)p + 16);
    }
};
struct GroupInt4 {
    static constexpr int64_t BYTES = GROUP / 2;
    static void lanes(const uint8_t *p, Lanes &first, Lanes &second) { load_nibbles(p, first, second); }
};

// One group of a row on top of `to`.
template <typename Group>
inline Lanes add_group(const uint8_t *w, const float *x, float scale, Lanes to) {
    Lanes first, second;
    Group::lanes(w, first, second);
    return mul_add(mul_add(second, load(x + 16), mul(first, load(x))), all(scale), to);
}

template <typename Group>
inline float group_row(const MatVec &m, int64_t row) {
    constexpr int64_t BATCH = 64;  // groups whose scales are converted together
    // Groups in flight. With two, whole cache lines are no longer read in one turn of the loop, and the hardware's
    // prefetch loses the stream: half the speed.
    constexpr int CHAINS = 4;
    const int64_t groups = m.in / GROUP;
    const uint8_t *w = (const uint8_t *)m.weight + row * groups * Group::BYTES;
    const uint16_t *scales = m.scales + row * groups;
    const float *x = m.x;
    float wide[BATCH];
    Lanes part[CHAINS] = {zero(), zero(), zero(), zero()};
    for (int64_t start = 0; start < groups; start += BATCH) {
        const int64_t count = groups - start < BATCH ? groups - start : BATCH;
        int64_t g = 0;
        for (; g + 16 <= count; g += 16) store(wide + g, load_f16(scales + start + g));
        for (; g < count; ++g) wide[g] = half_to_float(scales[start + g]);
        for (g = 0; g + CHAINS <= count; g += CHAINS, w += CHAINS * Group::BYTES, x += CHAINS * GROUP)
            for (int c = 0; c < CHAINS; ++c)
                part[c] = add_group<Group>(w + c * Group::BYTES, x + c * GROUP, wide[g + c], part[c]);
        for (; g < count; ++g, w += Group::BYTES, x += GROUP) part[0] = add_group<Group>(w, x, wide[g], part[0]);
    }
    return sum(add(add(part[0], part[1]), add(part[2], part[3])));
}

template <float (*ROW)(const MatVec &, int64_t)>
inline void rows(const MatVec &m, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) m.out[row] = ROW(m, row);
}

void matvec(const MatVec &m, int64_t begin, int64_t end) {
    switch (m.kind) {
        case WEIGHT_F32: return rows<float_row<LoadF32>>(m, begin, end);
        case WEIGHT_BF16: return rows<float_row<LoadBF16>>(m, begin, end);
        case WEIGHT_F16: return rows<float_row<LoadF16>>(m, begin, end);
        case WEIGHT_INT8: return rows<group_row<GroupInt8>>(m, begin, end);
        case WEIGHT_INT4: return rows<group_row<GroupInt4>>(m, begin, end);
    }
}
