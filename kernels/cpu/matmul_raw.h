// Products of weights as they are, with float32 sums. Each row is summed by several times sixteen lanes over its inputs in
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
inline float raw_row(const typename Load::Element *w, const float *x, int64_t in) {
    constexpr int CHAINS = 4;  // multiply-adds in flight
    Lanes part[CHAINS] = {zero(), zero(), zero(), zero()};
    int64_t j = 0;
    for (; j + 16 * CHAINS <= in; j += 16 * CHAINS)
        for (int c = 0; c < CHAINS; ++c) part[c] = mul_add(Load::lanes(w + j + 16 * c), load(x + j + 16 * c), part[c]);
    for (; j + 16 <= in; j += 16) part[0] = mul_add(Load::lanes(w + j), load(x + j), part[0]);
    float total = sum(add(add(part[0], part[1]), add(part[2], part[3])));
    for (; j < in; ++j) total += Load::one(w[j]) * x[j];
    return total;
}

template <typename Load>
void multiply_raw(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
        for (int64_t row = 0; row < rows.count; ++row)
            out[row * stride + i] =
                raw_row<Load>((const typename Load::Element *)m.weight + i * m.in, rows.x + row * rows.stride, m.in);
}
