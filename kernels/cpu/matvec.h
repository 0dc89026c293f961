// Matrix-vector products with float32 sums. Each row is summed by sixteen lanes over its inputs in order, then over
// the lanes; four rows at a time only keep the pipeline full, and change no row's order. Included inside an anonymous
// namespace, after lanes.h and half.h.

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

template <typename Load, int ROWS>
inline void float_rows(const MatVec &m, int64_t row) {
    using Element = typename Load::Element;
    const Element *w = (const Element *)m.weight + row * m.in;
    Lanes even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = zero();
    int64_t j = 0;
    for (; j + 32 <= m.in; j += 32) {
        const Lanes x0 = load(m.x + j), x1 = load(m.x + j + 16);
        for (int r = 0; r < ROWS; ++r) {
            even[r] = mul_add(Load::lanes(w + r * m.in + j), x0, even[r]);
            odd[r] = mul_add(Load::lanes(w + r * m.in + j + 16), x1, odd[r]);
        }
    }
    for (; j + 16 <= m.in; j += 16)
        for (int r = 0; r < ROWS; ++r) even[r] = mul_add(Load::lanes(w + r * m.in + j), load(m.x + j), even[r]);
    for (int r = 0; r < ROWS; ++r) {
        float total = sum(add(even[r], odd[r]));
        for (int64_t i = j; i < m.in; ++i) total += Load::one(w[r * m.in + i]) * m.x[i];
        m.out[row + r] = total;
    }
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

template <typename Group, int ROWS>
inline void group_rows(const MatVec &m, int64_t row) {
    constexpr int64_t BATCH = 64;  // groups whose scales are converted together
    const int64_t groups = m.in / GROUP;
    const uint8_t *w = (const uint8_t *)m.weight + row * groups * Group::BYTES;
    const uint16_t *scales = m.scales + row * groups;
    float wide[ROWS][BATCH];
    Lanes total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = zero();
    for (int64_t start = 0; start < groups; start += BATCH) {
        const int64_t count = groups - start < BATCH ? groups - start : BATCH;
        for (int r = 0; r < ROWS; ++r) {
            int64_t g = 0;
            for (; g + 16 <= count; g += 16) store(wide[r] + g, load_f16(scales + r * groups + start + g));
            for (; g < count; ++g) wide[r][g] = half_to_float(scales[r * groups + start + g]);
        }
        for (int64_t g = 0; g < count; ++g) {
            const float *x = m.x + (start + g) * GROUP;
            const Lanes x0 = load(x), x1 = load(x + 16);
            for (int r = 0; r < ROWS; ++r) {
                Lanes first, second;
                Group::lanes(w + (r * groups + start + g) * Group::BYTES, first, second);
                total[r] = mul_add(mul_add(second, x1, mul(first, x0)), all(wide[r][g]), total[r]);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) m.out[row + r] = sum(total[r]);
}

template <void (*FOUR)(const MatVec &, int64_t), void (*ONE)(const MatVec &, int64_t)>
inline void rows(const MatVec &m, int64_t begin, int64_t end) {
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) FOUR(m, row);
    for (; row < end; ++row) ONE(m, row);
}

void matvec(const MatVec &m, int64_t begin, int64_t end) {
    switch (m.kind) {
        case WEIGHT_F32: return rows<float_rows<LoadF32, 4>, float_rows<LoadF32, 1>>(m, begin, end);
        case WEIGHT_BF16: return rows<float_rows<LoadBF16, 4>, float_rows<LoadBF16, 1>>(m, begin, end);
        case WEIGHT_F16: return rows<float_rows<LoadF16, 4>, float_rows<LoadF16, 1>>(m, begin, end);
        case WEIGHT_INT8: return rows<group_rows<GroupInt8, 4>, group_rows<GroupInt8, 1>>(m, begin, end);
        case WEIGHT_INT4: return rows<group_rows<GroupInt4, 4>, group_rows<GroupInt4, 1>>(m, begin, end);
    }
}
