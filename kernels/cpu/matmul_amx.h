// Products of codes by AMX's tiles, sixteen rows at a time: whole numbers as matmul_groups.h has them, so that bits are the
// same. A group of a strip lies in memory as a tile is wanted, eight vectors of (16 outputs, 4 inputs); 4 bits become bytes
// once for all rows of a block. Included inside an anonymous namespace, by matmul_strips.h, after amx_tiles.h.

constexpr int64_t AMX_BYTES = STRIP * GROUP;  // of a group's codes, as bytes

// `count` groups of a strip as bytes with signs: where they lie, or at `room`.
inline const uint8_t *signed_bytes(Group8, const uint8_t *codes, int64_t, uint8_t *) { return codes; }
template <typename Code>
inline const uint8_t *signed_bytes(Group4<Code>, const uint8_t *codes, int64_t count, uint8_t *room) {
    const __m512i low = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(Code::OFFSET);
    const auto put = [&](__m512i half, uint8_t *to) {
        _mm512_store_si512(to, _mm512_sub_epi8(Code::bytes(_mm512_and_si512(half, low)), offset));
    };
    uint8_t *to = room;
    for (int64_t g = 0; g < count; ++g, to += AMX_BYTES)
        for (int i = 0; i < 4; ++i, codes += 64) {
            const __m512i both = _mm512_loadu_si512(codes);
            put(both, to + 64 * i);
            put(_mm512_srli_epi16(both, 4), to + 64 * i + AMX_BYTES / 2);
        }
    written(room);
    return room;
}

// Tiles of tile_rows: 0, 1: sums; 2, 3: rows; 4, 5: codes.
constexpr TileShape PRODUCT_TILES[] = {{AMX_ROWS, 64},       {AMX_ROWS, 64},       {AMX_ROWS, GROUP},
                                       {AMX_ROWS, GROUP}, {GROUP / 4, 64}, {GROUP / 4, 64}};

// Some groups of one strip times AMX_ROWS rows, on top of to[row]. The sums of a group are made while those of the one before
// are scaled.
template <typename Group>
inline void tile_rows(const uint8_t *bytes, const uint16_t *scales, int64_t groups, const RowGroup *row, int64_t stride,
                      float (*to)[STRIP]) {
    alignas(64) int32_t sums[2][AMX_ROWS][STRIP];
    const auto even = [&](const RowGroup *x) {
        _tile_zero(0);
        _tile_loadd(4, bytes, 64);
        _tile_loadd(2, x, stride);
        _tile_dpbssd(0, 2, 4);
        _tile_stored(0, sums[0], 64);
    };
    const auto odd = [&](const RowGroup *x) {
        _tile_zero(1);
        _tile_loadd(5, bytes, 64);
        _tile_loadd(3, x, stride);
        _tile_dpbssd(1, 3, 5);
        _tile_stored(1, sums[1], 64);
    };
    Lanes total[AMX_ROWS];
    EBBTIDE_SIXTEEN_TIMES for (int r = 0; r < AMX_ROWS; ++r) total[r] = load(to[r]);
    even(row);
    for (int64_t g = 0; g < groups; ++g, ++row, scales += Group::NUMBERS * STRIP) {
        bytes += AMX_BYTES;
        if (g + 1 < groups) (g & 1) ? even(row + 1) : odd(row + 1);
        const GroupScales<Group::NUMBERS> by(scales);
        const int32_t(*whole)[STRIP] = sums[g & 1];
        EBBTIDE_SIXTEEN_TIMES for (int r = 0; r < AMX_ROWS; ++r)
            total[r] = by.add({_mm512_cvtepi32_ps(_mm512_load_si512(whole[r]))}, apart(row, r * stride), total[r]);
    }
    EBBTIDE_SIXTEEN_TIMES for (int r = 0; r < AMX_ROWS; ++r) store(to[r], total[r]);
}
