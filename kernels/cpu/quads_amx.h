// Products of a page's codes by AMX's tiles, AMX_ROWS rows of numbers at a time: whole numbers as quads.h has them, so that bits
// are the same. Included inside an anonymous namespace, by quads.h, after amx_tiles.h.

// Two terms of a number, 256 * high + low, times the codes of `tokens` or elements: tiles 0, 1: sums; 2, 3: numbers; 4: codes;
// 5, 6, 7: numbers and codes of what is left of 64.
class NumberTiles {
public:
    explicit NumberTiles(int64_t wide) : wide_(wide), shapes_(Shapes(wide).all) {}

    // sums[r] = the products of AMX_ROWS rows, row_bytes apart, with sixteen columns of codes, whose lines of four are line_bytes
    // apart.
    void multiply(const uint8_t *numbers, int64_t row_bytes, const uint8_t *codes, int64_t line_bytes) {
        const uint8_t *low = numbers + wide_;
        _tile_zero(0);
        _tile_zero(1);
        int64_t j = 0;
        for (; j + 64 <= wide_; j += 64, codes += 16 * line_bytes) {
            _tile_loadd(4, codes, line_bytes);
            _tile_loadd(2, numbers + j, row_bytes);
            _tile_dpbsud(0, 2, 4);
            _tile_loadd(3, low + j, row_bytes);
            _tile_dpbsud(1, 3, 4);
        }
        if (j < wide_) {
            _tile_loadd(7, codes, line_bytes);
            _tile_loadd(5, numbers + j, row_bytes);
            _tile_dpbsud(0, 5, 7);
            _tile_loadd(6, low + j, row_bytes);
            _tile_dpbsud(1, 6, 7);
        }
        _tile_stored(0, high_, 64);
        _tile_stored(1, low_, 64);
    }
    Lanes sums(int r) const {
        return to_lanes({_mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high_[r]), 8), _mm512_load_si512(low_[r]))});
    }

private:
    struct Shapes {
        TileShape all[8];
        explicit Shapes(int64_t wide)
            : all{{AMX_ROWS, 64}, {AMX_ROWS, 64}, {AMX_ROWS, 64}, {AMX_ROWS, 64}, {16, 64}, {}, {}, {}} {
            const int left = (int)(wide % 64);
            if (left) all[5] = all[6] = {AMX_ROWS, left}, all[7] = {left / 4, 64};
        }
    };
    int64_t wide_;
    TileShapes shapes_;
    alignas(64) int32_t high_[AMX_ROWS][16], low_[AMX_ROWS][16];
};

// Tiles of keys (tiles.h) as lines of four elements of sixteen tokens: [tokens / 16][wide / 4][16 tokens][4 elements].
inline void turn_keys(const uint8_t *tiles, int64_t blocks, int64_t tokens, uint8_t *to) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const int64_t quad = blocks * 64;
    for (int64_t t = 0; t < tokens; t += 16, tiles += 4 * quad)
        for (int64_t i = 0; i < blocks; ++i, to += 256) {
            const auto tile = [&](int n) { return _mm512_loadu_si512(tiles + n * quad + i * 64); };
            const __m512i a = tile(0), b = tile(1), c = tile(2), d = tile(3);
            const __m512i ab = _mm512_unpacklo_epi32(a, b), more_ab = _mm512_unpackhi_epi32(a, b);
            const __m512i cd = _mm512_unpacklo_epi32(c, d), more_cd = _mm512_unpackhi_epi32(c, d);
            const auto put = [&](int line, __m512i x) { _mm512_storeu_si512(to + 64 * line, _mm512_permutexvar_epi32(order, x)); };
            put(0, _mm512_unpacklo_epi64(ab, cd));
            put(1, _mm512_unpackhi_epi64(ab, cd));
            put(2, _mm512_unpacklo_epi64(more_ab, more_cd));
            put(3, _mm512_unpackhi_epi64(more_ab, more_cd));
        }
}

// Scores of whole sixteens of rows, as score_sixteen's; returns how many rows. `room` has as many bytes as tiles.
inline int64_t score_by_amx(const uint8_t *tiles, int64_t blocks, int64_t tokens, const uint8_t *q, int64_t rows, const float *base,
                            const float *step, float *out, int64_t stride, uint8_t *room, Ahead &ahead) {
    if (rows < AMX_ROWS) return 0;
    const int64_t wide = blocks * 16;
    turn_keys(tiles, blocks, tokens, room);
    written(room);
    written(q);
    NumberTiles products(wide);
    ahead.spread_over(rows / AMX_ROWS * whole_lanes(tokens) / 16);
    int64_t r = 0;
    for (; r + AMX_ROWS <= rows; r += AMX_ROWS)
        for (int64_t t = 0; t < tokens; t += 16, ahead.step()) {
            products.multiply(q + r * 2 * wide, 2 * wide, room + t * wide, 64);
            for (int i = 0; i < AMX_ROWS; ++i)
                store(out + (r + i) * stride + t, mul_add(products.sums(i), all(step[r + i]), all(base[r + i])));
        }
    return r;
}

// Sums of whole sixteens of rows, as add_all_tiles's; returns how many rows.
inline int64_t add_by_amx(const uint8_t *tiles, int64_t blocks, const uint8_t *weights, int64_t padded, int64_t rows,
                          const float *step, float *sums, Ahead &ahead) {
    if (rows < AMX_ROWS) return 0;
    const int64_t wide = blocks * 16;
    written(tiles);
    written(weights);
    NumberTiles products(padded);
    ahead.spread_over(rows / AMX_ROWS * blocks);
    int64_t r = 0;
    for (; r + AMX_ROWS <= rows; r += AMX_ROWS)
        for (int64_t b = 0; b < blocks; ++b, ahead.step()) {
            products.multiply(weights + r * 2 * padded, 2 * padded, tiles + b * 64, blocks * 64);
            for (int i = 0; i < AMX_ROWS; ++i) {
                float *to = sums + (r + i) * wide + b * 16;
                store(to, mul_add(products.sums(i), all(step[r + i]), load(to)));
            }
        }
    return r;
}
