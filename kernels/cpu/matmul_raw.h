// Products of weights as they are, with float32 sums. An output is summed by 64 lanes over its inputs in order (what is
// left of them by the first sixteen, then one by one), then over the lanes: an order that the number of inputs alone fixes.
//
// A single row takes one output after the other: a single stream of addresses reads at 0.93 of the ceiling, four outputs
// side by side at 0.63 (an EPYC of the fourth generation). Where the row itself leaves the first cache, at some 8192 inputs,
// it is the other way round: 0.45 one by one, 0.7 to 0.8 (bf16) and 0.95 (float32) four by four. More rows are multiplied in
// tiles of a few rows by QUAD outputs, whose sums stay in registers for one lane vector of the 64 at a time.
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

// Some neighbouring outputs of some rows: out[r * stride + o].
template <typename Load, int ROWS, int OUTPUTS>
inline void raw_dots(const typename Load::Element *w, const float *x, int64_t x_stride, int64_t in, float *out,
                     int64_t stride) {
    constexpr int CHAINS = 4;  // multiply-adds in flight
    Lanes part[ROWS][OUTPUTS][CHAINS];
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o)
            for (int c = 0; c < CHAINS; ++c) part[r][o][c] = zero();
    int64_t j = 0;
    for (; j + 16 * CHAINS <= in; j += 16 * CHAINS)
        for (int c = 0; c < CHAINS; ++c)
            for (int o = 0; o < OUTPUTS; ++o) {
                const Lanes weights = Load::lanes(w + o * in + j + 16 * c);
                for (int r = 0; r < ROWS; ++r)
                    part[r][o][c] = mul_add(weights, load(x + r * x_stride + j + 16 * c), part[r][o][c]);
            }
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o) {
            const typename Load::Element *at = w + o * in;
            Lanes *p = part[r][o];
            int64_t i = j;
            for (; i + 16 <= in; i += 16) p[0] = mul_add(Load::lanes(at + i), load(x + r * x_stride + i), p[0]);
            float total = sum(add(add(p[0], p[1]), add(p[2], p[3])));
            for (; i < in; ++i) total += Load::one(at[i]) * x[r * x_stride + i];
            out[r * stride + o] = total;
        }
}

template <typename Load>
void multiply_few_raw(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    constexpr int64_t WIDE = sizeof(typename Load::Element) == 4 ? 3072 : 6144;
    const typename Load::Element *weight = (const typename Load::Element *)m.weight;
    int64_t i = begin;
    if (rows.count == 1 && m.in > WIDE)
        for (; i + 4 <= end; i += 4) raw_dots<Load, 1, 4>(weight + i * m.in, rows.x, 0, m.in, out + i, 0);
    for (; i < end; ++i) {
        const typename Load::Element *w = weight + i * m.in;
        int64_t r = 0;
        for (; r + 4 <= rows.count; r += 4)
            raw_dots<Load, 4, 1>(w, rows.x + r * rows.stride, rows.stride, m.in, out + r * stride + i, stride);
        for (; r + 2 <= rows.count; r += 2)
            raw_dots<Load, 2, 1>(w, rows.x + r * rows.stride, rows.stride, m.in, out + r * stride + i, stride);
        if (r < rows.count) raw_dots<Load, 1, 1>(w, rows.x + r * rows.stride, 0, m.in, out + r * stride + i, 0);
    }
}

// One lane vector as the machine has it.
#if defined(__AVX2__) && !(defined(__AVX512F__) && defined(__AVX512BW__))
struct Native {
    __m256 v;
};
constexpr int64_t NATIVE = 8;
constexpr int TILE_ROWS = 3;
inline Native load_native(const float *p) { return {_mm256_loadu_ps(p)}; }
inline Native zero_native() { return {_mm256_setzero_ps()}; }
inline void store_natives(float *p, int64_t step, Lanes a) {
    _mm256_storeu_ps(p, a.a);
    _mm256_storeu_ps(p + step, a.b);
}
inline void store(float *p, Native a) { _mm256_storeu_ps(p, a.v); }
inline Native mul_add(Native a, Native b, Native c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#else
using Native = Lanes;
constexpr int64_t NATIVE = 16;
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 2;
#endif
inline Native load_native(const float *p) { return load(p); }
inline Native zero_native() { return zero(); }
inline void store_natives(float *p, int64_t, Lanes a) { store(p, a); }
#endif

constexpr int QUAD = 4;
constexpr int64_t TURN = 64;
// Inputs, outputs and rows at a time: the share of one lane vector and QUAD outputs stays in the first cache for all the
// rows, and all of them and their sums, 700 KiB, in the second.
constexpr int64_t SEGMENT = 2048, BUNCH = 16, MOST_ROWS = 48, FEW_ROWS = 6;

// COUNT runs of `turns` turns to (TURN / NATIVE, turns, COUNT, NATIVE) floats.
template <typename Load, int COUNT>
inline void interleave(const typename Load::Element *const *from, int64_t turns, float *to) {
    const int64_t step = turns * COUNT * NATIVE;
    for (int64_t j = 0; j < turns; ++j)
        for (int i = 0; i < COUNT; ++i) {
            float *place = to + (j * COUNT + i) * NATIVE;
            for (int64_t lane = 0; lane < TURN; lane += 16)
                store_natives(place + lane / NATIVE * step, step, Load::lanes(from[i] + j * TURN + lane));
        }
}

// One lane vector's sums of TILE_ROWS rows and QUAD outputs over `turns` turns: w (turns, QUAD, NATIVE), x (turns, TILE_ROWS,
// NATIVE), sums (TILE_ROWS, QUAD, TURN) from the vector's place on.
inline void raw_tile(const float *w, const float *x, int64_t turns, float *sums) {
    Native total[TILE_ROWS][QUAD];  // GCC keeps it in registers where the loops around are unrolled early
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 8
        for (int o = 0; o < QUAD; ++o) total[r][o] = load_native(sums + (r * QUAD + o) * TURN);
    for (int64_t j = 0; j < turns; ++j, w += QUAD * NATIVE, x += TILE_ROWS * NATIVE) {
        Native row[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; ++r) row[r] = load_native(x + r * NATIVE);
        for (int o = 0; o < QUAD; ++o) {
            const Native weight = load_native(w + o * NATIVE);
            for (int r = 0; r < TILE_ROWS; ++r) total[r][o] = mul_add(weight, row[r], total[r][o]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 8
        for (int o = 0; o < QUAD; ++o) store(sums + (r * QUAD + o) * TURN, total[r][o]);
}

// QUAD outputs of a row from its sums.
template <typename Load>
inline void finish_quad(const typename Load::Element *const *w, const float *x, int64_t in, float *sums, float *to) {
    int64_t j = in / TURN * TURN;
    for (; j + 16 <= in; j += 16)
        for (int o = 0; o < QUAD; ++o)
            store(sums + o * TURN, mul_add(Load::lanes(w[o] + j), load(x + j), load(sums + o * TURN)));
    Lanes each[QUAD];
    for (int o = 0; o < QUAD; ++o) {
        const float *p = sums + o * TURN;
        each[o] = add(add(load(p), load(p + 16)), add(load(p + 32), load(p + 48)));
    }
    sum_four(each[0], each[1], each[2], each[3], to);
    for (; j < in; ++j)
        for (int o = 0; o < QUAD; ++o) to[o] += Load::one(w[o][j]) * x[j];
}

// Rows and outputs that are missing in a tile are others again.
template <typename Load>
struct RawBlock {
    using Element = typename Load::Element;
    const Matrix &m;
    const float *x;
    int64_t x_stride, count;  // of rows
    int64_t whole, tiles;     // inputs in whole turns; tiles of rows
    // (tiles, whole, TILE_ROWS); (BUNCH / QUAD, tiles, TILE_ROWS, QUAD, TURN); (SEGMENT, QUAD)
    float *turned, *sums, *weights;

    int64_t inputs(int64_t k) const { return whole - k < SEGMENT ? whole - k : SEGMENT; }
    const Element *output(int64_t i, int64_t end) const {
        return (const Element *)m.weight + (i < end ? i : end - 1) * m.in;
    }

    void turn_rows() {
        for (int64_t t = 0; t < tiles; ++t)
            for (int64_t k = 0; k < whole; k += SEGMENT) {
                const float *from[TILE_ROWS];
                for (int64_t r = t * TILE_ROWS, i = 0; i < TILE_ROWS; ++i)
                    from[i] = x + (r + i < count ? r + i : count - 1) * x_stride + k;
                interleave<LoadF32, TILE_ROWS>(from, inputs(k) / TURN, turned + (t * whole + k) * TILE_ROWS);
            }
    }

    // Outputs begin .. end, BUNCH at most.
    void multiply_bunch(int64_t begin, int64_t end, float *out, int64_t stride) {
        const int64_t quads = (end - begin + QUAD - 1) / QUAD, quad_sums = tiles * TILE_ROWS * QUAD * TURN;
        std::memset(sums, 0, (size_t)(quads * quad_sums) * sizeof(float));
        for (int64_t k = 0; k < whole; k += SEGMENT)
            for (int64_t q = 0; q < quads; ++q) {
                const int64_t turns = inputs(k) / TURN;
                const Element *from[QUAD];
                for (int o = 0; o < QUAD; ++o) from[o] = output(begin + q * QUAD + o, end) + k;
                interleave<Load, QUAD>(from, turns, weights);
                for (int64_t v = 0; v < TURN / NATIVE; ++v)
                    for (int64_t t = 0; t < tiles; ++t)
                        raw_tile(weights + v * turns * QUAD * NATIVE,
                                 turned + (t * whole + k + v * turns * NATIVE) * TILE_ROWS, turns,
                                 sums + q * quad_sums + t * TILE_ROWS * QUAD * TURN + v * NATIVE);
            }
        for (int64_t q = 0; q < quads; ++q) {
            const int64_t i = begin + q * QUAD, outputs = end - i < QUAD ? end - i : QUAD;
            const Element *w[QUAD];
            for (int o = 0; o < QUAD; ++o) w[o] = output(i + o, end);
            for (int64_t r = 0; r < count; ++r) {
                float four[QUAD];
                finish_quad<Load>(w, x + r * x_stride, m.in, sums + q * quad_sums + r * QUAD * TURN, four);
                std::memcpy(out + r * stride + i, four, (size_t)outputs * sizeof(float));
            }
        }
    }
};

template <typename Load>
void multiply_raw(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    if (rows.count < FEW_ROWS) return multiply_few_raw<Load>(m, rows, out, stride, begin, end);
    const int64_t most = rows.count < MOST_ROWS ? (rows.count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : MOST_ROWS;
    std::vector<float> scratch((size_t)(most * m.in + most * BUNCH * TURN + QUAD * SEGMENT + 16));
    float *sums = (float *)(((uintptr_t)scratch.data() + 63) / 64 * 64), *weights = sums + most * BUNCH * TURN;
    for (int64_t top = 0; top < rows.count; top += most) {
        const int64_t count = rows.count - top < most ? rows.count - top : most;
        RawBlock<Load> some{m, rows.x + top * rows.stride, rows.stride, count, m.in / TURN * TURN,
                            (count + TILE_ROWS - 1) / TILE_ROWS, weights + QUAD * SEGMENT, sums, weights};
        some.turn_rows();
        for (int64_t i = begin; i < end; i += BUNCH)
            some.multiply_bunch(i, i + BUNCH < end ? i + BUNCH : end, out + top * stride, stride);
    }
}
