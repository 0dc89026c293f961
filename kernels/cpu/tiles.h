// Codes of a page as bytes, four tokens together, for quads.h. Included inside an anonymous namespace, after planes.h, pages.h and
// codes.h.
//
// A tile is 64 bytes: sixteen neighbouring elements of each of four tokens, token after token. Tiles of a page lie
// [tokens / 4][blocks of sixteen elements]. Where bytes are multiplied four at a time (AVX-512 VNNI, ARM's dot products),
// tiles of values hold tokens of each element side by side instead: four, or two where a register holds no more. ARM
// multiplies signed bytes alone, so that there tiles hold codes - 128.

// As much of a tile as one register holds.
#if defined(__AVX512F__)
typedef uint64_t Tile __attribute__((vector_size(64)));
#else
typedef Bytes32 Tile;  // two tokens: a compiler takes a vector that is longer than its registers through memory
#endif
constexpr int64_t TILE_TOKENS = (int64_t)sizeof(Tile) / 16;

#if defined(__AVX512VNNI__) || defined(EBBTIDE_NEON_DOT)
constexpr bool BYTE_PRODUCTS = true;
#else
constexpr bool BYTE_PRODUCTS = false;
#endif
// Whether codes are multiplied faster than floats by many rows too: not where four numbers are a register, as on ARM.
constexpr bool BEATS_FLOATS = BYTE_PRODUCTS && TILE_TOKENS == 4;

inline int64_t num_blocks(int64_t dim) { return (dim + 15) / 16; }
inline int64_t tile_bytes(int64_t tokens, int64_t dim) { return (tokens + 15) / 16 * 4 * num_blocks(dim) * 64; }

// Sixteen bytes of each of a tile's tokens, `run` bytes apart.
inline Tile load_tile(const uint8_t *p, int64_t run) {
#if defined(__AVX512F__)
    if (run == 16) return (Tile)_mm512_loadu_si512(p);
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + run)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 2 * run)), 2);
    return (Tile)_mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 3 * run)), 3);
#elif defined(__AVX2__)
    if (run == 16) return (Tile)_mm256_loadu_si256((const __m256i *)p);
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return (Tile)_mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)(p + run)), 1);
#else
    Tile x;
    for (int t = 0; t < TILE_TOKENS; ++t) std::memcpy((uint8_t *)&x + 16 * t, p + t * run, 16);
    return x;
#endif
}

// Eight bytes of each of a tile's tokens, twice, the second time moved by WIDTH bits: the bytes' next elements.
template <int WIDTH>
inline Tile load_short_tile(const uint8_t *p) {
    uint64_t parts[TILE_TOKENS];
    std::memcpy(parts, p, sizeof parts);
#if defined(__AVX512F__)
    const Tile twice = {parts[0], parts[0], parts[1], parts[1], parts[2], parts[2], parts[3], parts[3]};
    const Tile shifts = {0, WIDTH, 0, WIDTH, 0, WIDTH, 0, WIDTH};
#else
    const Tile twice = {parts[0], parts[0], parts[1], parts[1]};
    const Tile shifts = {0, WIDTH, 0, WIDTH};
#endif
    return twice >> shifts;
}

// Elements `at` and on of every byte of a plane of WIDTH bits, moved up by `below` bits.
template <int WIDTH>
inline Tile elements(Tile x, int at, int below) {
    const uint64_t mask = byte_mask<WIDTH>() << below;
    const int shift = at * WIDTH - below;
    return (shift >= 0 ? x >> shift : x << -shift) & mask;
}

// ORs a plane's bits of a tile's tokens into their tiles, or, the first time, sets these. BLOCKS is known to the compiler for the
// usual sizes, and the tiles then stay in registers.
template <int WIDTH, int BLOCKS>
inline void add_plane(const uint8_t *plane, int64_t blocks, int below, bool first, Tile *tiles) {
    if (BLOCKS) blocks = BLOCKS;
    if (WIDTH == 0) return;
    constexpr int W = WIDTH ? WIDTH : 1;
    const int64_t run = blocks * 16 * W / 8;
    if (run == 8) {
        const Tile x = load_short_tile<W>(plane);
        for (int64_t i = 0; i < blocks; ++i) {
            const Tile part = elements<W>(x, (int)(2 * i), below);
            tiles[i] = first ? part : tiles[i] | part;
        }
        return;
    }
    for (int64_t b = 0; b < run / 16; ++b) {
        const Tile x = load_tile(plane + 16 * b, run);
        for (int p = 0; p < 8 / W; ++p) {
            const Tile part = elements<W>(x, p, below);
            Tile &to = tiles[p * run / 16 + b];
            to = first ? part : to | part;
        }
    }
}

// A tile's tokens, one after the other, as products take them.
template <bool VALUES>
inline Tile as_multiplied(Tile x) {
#if defined(__AVX512VNNI__)
    if (!VALUES) return x;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i within = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return (Tile)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, (__m512i)x), within);
#elif defined(EBBTIDE_NEON_DOT)
    x ^= 0x8080808080808080ull;
    if (!VALUES) return x;
    uint8x16_t tokens[2];
    std::memcpy(tokens, &x, sizeof x);
    const uint8x16_t pairs[2] = {vzip1q_u8(tokens[0], tokens[1]), vzip2q_u8(tokens[0], tokens[1])};
    std::memcpy(&x, pairs, sizeof x);
    return x;
#else
    return x;
#endif
}

// Where the planes of a page's codes are: up to four, the most significant first.
constexpr int MOST_PLANES = 4;
struct CodePlanes {
    const uint8_t *data[MOST_PLANES];
};

template <int BLOCKS, int A, int B, int C, int D, bool VALUES>
void read_tiles(const CodePlanes &p, int64_t tokens, int64_t blocks, uint8_t *to) {
    if (BLOCKS) blocks = BLOCKS;
    constexpr int MOST = BLOCKS ? BLOCKS : 64;
    const int64_t token_bits = blocks * 16;
    for (int64_t t = 0; t < tokens; t += TILE_TOKENS) {
        Tile tiles[MOST];
        add_plane<A, BLOCKS>(p.data[0] + t * token_bits * A / 8, blocks, B + C + D, true, tiles);
        add_plane<B, BLOCKS>(p.data[1] + t * token_bits * B / 8, blocks, C + D, false, tiles);
        add_plane<C, BLOCKS>(p.data[2] + t * token_bits * C / 8, blocks, D, false, tiles);
        add_plane<D, BLOCKS>(p.data[3] + t * token_bits * D / 8, blocks, 0, false, tiles);
        for (int64_t i = 0; i < blocks; ++i) {
            const Tile tile = as_multiplied<VALUES>(tiles[i]);
            std::memcpy(to + (t / 4 * blocks + i) * 64 + t % 4 * 16, &tile, sizeof tile);
        }
    }
}

typedef void (*ReadTiles)(const CodePlanes &, int64_t tokens, int64_t blocks, uint8_t *to);

template <int A, int B, int C, int D, bool VALUES>
inline ReadTiles tile_reader_of(int64_t dim) {
    if (dim == 64) return read_tiles<4, A, B, C, D, VALUES>;
    if (dim == 128) return read_tiles<8, A, B, C, D, VALUES>;
    return read_tiles<0, A, B, C, D, VALUES>;
}

// The reader of planes of some widths, or null for those that have none.
template <bool VALUES>
inline ReadTiles tile_reader(const int *widths, int64_t dim) {
    const int key = widths[0] * 1000 + widths[1] * 100 + widths[2] * 10 + widths[3];
    for (int i = 0; i < MOST_PLANES; ++i) {
        const int64_t run = dim * widths[i] / 8;
        if (dim % 16 || (run % 16 && run != 8)) return nullptr;
    }
    switch (key) {
        case 2120: return tile_reader_of<2, 1, 2, 0, VALUES>(dim);
        case 2121: return tile_reader_of<2, 1, 2, 1, VALUES>(dim);
        case 2141: return tile_reader_of<2, 1, 4, 1, VALUES>(dim);
        case 2210: return tile_reader_of<2, 2, 1, 0, VALUES>(dim);
        case 2400: return tile_reader_of<2, 4, 0, 0, VALUES>(dim);
        case 2420: return tile_reader_of<2, 4, 2, 0, VALUES>(dim);
        case 4000: return tile_reader_of<4, 0, 0, 0, VALUES>(dim);
        case 4200: return tile_reader_of<4, 2, 0, 0, VALUES>(dim);
        case 8000: return tile_reader_of<8, 0, 0, 0, VALUES>(dim);
        default: return nullptr;
    }
}

// Every token's bits of a plane as bytes, `below` bits up, dim to a token. Each run is moved in whole vectors, whose ends the
// next one overwrites: up to sizeof(Bytes) - 1 more bytes than there are are read, and written.
template <int WIDTH, typename Bytes>
inline void spread_runs(const uint8_t *plane, int64_t tokens, int64_t dim, int below, uint8_t *to) {
    const int64_t run = dim * WIDTH / 8;
    for (int64_t t = 0; t < tokens; ++t, plane += run)
        for (int p = 0; p < 8 / WIDTH; ++p, to += run)
            for (int64_t j = 0; j < run; j += (int64_t)sizeof(Bytes)) {
                Bytes x;
                std::memcpy(&x, plane + j, sizeof x);
                x = ((x >> (p * WIDTH)) & byte_mask<WIDTH>()) << below;
                std::memcpy(to + j, &x, sizeof x);
            }
}

template <int WIDTH>
inline void spread_plane(const uint8_t *plane, int64_t tokens, int64_t dim, int below, uint8_t *to) {
    if (dim * WIDTH / 8 <= 16) return spread_runs<WIDTH, Bytes16>(plane, tokens, dim, below, to);
    spread_runs<WIDTH, Bytes32>(plane, tokens, dim, below, to);
}

inline void spread_plane(int width, const uint8_t *plane, int64_t tokens, int64_t dim, int below, uint8_t *to) {
    switch (width) {
        case 1: return spread_plane<1>(plane, tokens, dim, below, to);
        case 2: return spread_plane<2>(plane, tokens, dim, below, to);
        case 4: return spread_plane<4>(plane, tokens, dim, below, to);
        default: return spread_plane<8>(plane, tokens, dim, below, to);
    }
}

// Whether `read_spread_tiles` serves: what lies behind the codes (the steps of this many tokens, or elements) may be read as well.
inline bool can_spread(int64_t tokens, int64_t dim) { return dim % 16 == 0 && tokens >= 8; }

// The same for runs that are not made of whole tiles (heads of 80, 96, 112): each plane as bytes first, a few tokens at a time,
// then all of them in tiles.
template <bool VALUES>
inline void read_spread_tiles(const int *widths, const CodePlanes &planes, int64_t tokens, int64_t dim, uint8_t *to) {
    constexpr int64_t ROOM = 4096;
    uint8_t spread[MOST_PLANES][ROOM + 32];
    const int64_t blocks = num_blocks(dim), most = ROOM / dim / 4 * 4;
    int count = 0, bits = 0;
    for (; count < MOST_PLANES && widths[count]; ++count) bits += widths[count];
    for (int64_t first = 0; first < tokens; first += most) {
        const int64_t some = tokens - first < most ? tokens - first : most;
        for (int i = 0, below = bits; i < count; ++i) {
            below -= widths[i];
            spread_plane(widths[i], planes.data[i] + first * dim * widths[i] / 8, some, dim, below, spread[i]);
        }
        for (int64_t t = 0; t < some; t += TILE_TOKENS)
            for (int64_t b = 0; b < blocks; ++b) {
                Tile tile = load_tile(spread[0] + t * dim + 16 * b, dim);
                for (int i = 1; i < count; ++i) tile |= load_tile(spread[i] + t * dim + 16 * b, dim);
                tile = as_multiplied<VALUES>(tile);
                std::memcpy(to + ((first + t) / 4 * blocks + b) * 64 + t % 4 * 16, &tile, sizeof tile);
            }
    }
}

// The same for any planes: token by token.
template <bool VALUES>
inline void read_any_tiles(const CodeReader &reader, int64_t tokens, int64_t dim, uint8_t *to) {
    const int64_t blocks = num_blocks(dim);
    uint8_t codes[MAX_DIM + 16];
    for (int64_t t = 0; t < tokens; ++t) {
        reader.read(t, codes);
        for (int64_t j = dim; j < blocks * 16; ++j) codes[j] = 0;
        for (int64_t i = 0; i < blocks; ++i) std::memcpy(to + (t / 4 * blocks + i) * 64 + t % 4 * 16, codes + i * 16, 16);
    }
    if (!BYTE_PRODUCTS) return;
    for (int64_t i = 0; i < (tokens + 3) / 4 * blocks * 64; i += (int64_t)sizeof(Tile)) {
        Tile x;
        std::memcpy(&x, to + i, sizeof x);
        x = as_multiplied<VALUES>(x);
        std::memcpy(to + i, &x, sizeof x);
    }
}
