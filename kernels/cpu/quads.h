// Codes of a page as bytes, four tokens together, and their products with whole numbers of sixteen bits. All products are
// exact sums of int32, and so alike in every instruction set. Included inside an anonymous namespace, after planes.h, pages.h
// and codes.h.
//
// A tile is 64 bytes: sixteen neighbouring elements of each of four tokens, token after token. Tiles of a page lie
// [tokens / 4][blocks of sixteen elements]. Where bytes are multiplied four at a time (VNNI), tiles of values hold
// the four tokens of each element side by side instead, and a number of sixteen bits is two bytes, 256 * high + low.

// Sums stay in registers only where the loops over them are gone early.
#if defined(__GNUC__) && !defined(__clang__)
#define EBBTIDE_UNROLLED _Pragma("GCC unroll 8")
#else
#define EBBTIDE_UNROLLED _Pragma("unroll")
#endif

#if defined(__AVX512F__)
typedef uint64_t Tile __attribute__((vector_size(64)));
#else
// Two halves: a compiler takes a vector that is longer than its registers through memory.
struct Tile {
    Bytes32 a, b;
};
inline Tile operator>>(Tile x, int n) { return {x.a >> n, x.b >> n}; }
inline Tile operator<<(Tile x, int n) { return {x.a << n, x.b << n}; }
inline Tile operator&(Tile x, uint64_t mask) { return {x.a & mask, x.b & mask}; }
inline Tile operator|(Tile x, Tile y) { return {x.a | y.a, x.b | y.b}; }
#endif

#if defined(__AVX512VNNI__)
constexpr bool BYTE_PRODUCTS = true;
#else
constexpr bool BYTE_PRODUCTS = false;
#endif

inline int64_t num_blocks(int64_t dim) { return (dim + 15) / 16; }
inline int64_t tile_bytes(int64_t tokens, int64_t dim) { return (tokens + 15) / 16 * 4 * num_blocks(dim) * 64; }

// Sixteen bytes of each of four tokens, `run` bytes apart.
inline Tile load_tile(const uint8_t *p, int64_t run) {
#if defined(__AVX512F__)
    if (run == 16) return (Tile)_mm512_loadu_si512(p);
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + run)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 2 * run)), 2);
    return (Tile)_mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 3 * run)), 3);
#elif defined(__AVX2__)
    const auto pair = [run](const uint8_t *q) {
        const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)q));
        return (Bytes32)_mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)(q + run)), 1);
    };
    return {pair(p), pair(p + 2 * run)};
#else
    Tile x;
    for (int t = 0; t < 2; ++t) {
        std::memcpy((uint8_t *)&x.a + 16 * t, p + t * run, 16);
        std::memcpy((uint8_t *)&x.b + 16 * t, p + (t + 2) * run, 16);
    }
    return x;
#endif
}

// Eight bytes of each of four tokens, twice, the second time moved by WIDTH bits: the bytes' next elements.
template <int WIDTH>
inline Tile load_short_tile(const uint8_t *p) {
    uint64_t parts[4];
    std::memcpy(parts, p, 32);
#if defined(__AVX512F__)
    const Tile twice = {parts[0], parts[0], parts[1], parts[1], parts[2], parts[2], parts[3], parts[3]};
    const Tile shifts = {0, WIDTH, 0, WIDTH, 0, WIDTH, 0, WIDTH};
    return twice >> shifts;
#else
    const Bytes32 first = {parts[0], parts[0], parts[1], parts[1]}, second = {parts[2], parts[2], parts[3], parts[3]};
    const Bytes32 shifts = {0, WIDTH, 0, WIDTH};
    return {first >> shifts, second >> shifts};
#endif
}

// Elements `at` and on of every byte of a plane of WIDTH bits, moved up by `below` bits.
template <int WIDTH>
inline Tile elements(Tile x, int at, int below) {
    const uint64_t mask = byte_mask<WIDTH>() << below;
    const int shift = at * WIDTH - below;
    return (shift >= 0 ? x >> shift : x << -shift) & mask;
}

// ORs a plane's bits of four tokens into their tiles, or, the first time, sets these. BLOCKS is known to the compiler for the
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

// The four tokens of each element side by side, where products take them so.
inline Tile by_element(Tile x) {
#if defined(__AVX512VNNI__)
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i within = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return (Tile)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, (__m512i)x), within);
#else
    return x;
#endif
}

// Where the planes of a page's codes are: up to three, the most significant first.
struct CodePlanes {
    const uint8_t *data[3];
};

template <int BLOCKS, int A, int B, int C, bool VALUES>
void read_tiles(const CodePlanes &p, int64_t tokens, int64_t blocks, uint8_t *to) {
    if (BLOCKS) blocks = BLOCKS;
    constexpr int MOST = BLOCKS ? BLOCKS : 64;
    const int64_t token_bits = blocks * 16;
    for (int64_t t = 0; t < tokens; t += 4) {
        Tile tiles[MOST];
        add_plane<A, BLOCKS>(p.data[0] + t * token_bits * A / 8, blocks, B + C, true, tiles);
        add_plane<B, BLOCKS>(p.data[1] + t * token_bits * B / 8, blocks, C, false, tiles);
        add_plane<C, BLOCKS>(p.data[2] + t * token_bits * C / 8, blocks, 0, false, tiles);
        for (int64_t i = 0; i < blocks; ++i) {
            const Tile tile = VALUES ? by_element(tiles[i]) : tiles[i];
            std::memcpy(to + (t / 4 * blocks + i) * 64, &tile, 64);
        }
    }
}

typedef void (*ReadTiles)(const CodePlanes &, int64_t tokens, int64_t blocks, uint8_t *to);

template <int A, int B, int C, bool VALUES>
inline ReadTiles tile_reader_of(int64_t dim) {
    if (dim == 64) return read_tiles<4, A, B, C, VALUES>;
    if (dim == 128) return read_tiles<8, A, B, C, VALUES>;
    return read_tiles<0, A, B, C, VALUES>;
}

// The reader of planes of some widths, or null for those that have none.
template <bool VALUES>
inline ReadTiles tile_reader(const int *widths, int64_t dim) {
    const int key = widths[0] * 100 + widths[1] * 10 + widths[2];
    for (int i = 0; i < 3; ++i) {
        const int64_t run = dim * widths[i] / 8;
        if (dim % 16 || (run % 16 && run != 8)) return nullptr;
    }
    switch (key) {
        case 221: return tile_reader_of<2, 2, 1, VALUES>(dim);
        case 240: return tile_reader_of<2, 4, 0, VALUES>(dim);
        case 242: return tile_reader_of<2, 4, 2, VALUES>(dim);
        case 400: return tile_reader_of<4, 0, 0, VALUES>(dim);
        case 420: return tile_reader_of<4, 2, 0, VALUES>(dim);
        case 800: return tile_reader_of<8, 0, 0, VALUES>(dim);
        default: return nullptr;
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
    if (!VALUES || !BYTE_PRODUCTS) return;
    for (int64_t i = 0; i < tokens / 4 * blocks; ++i) {
        Tile x;
        std::memcpy(&x, to + i * 64, 64);
        x = by_element(x);
        std::memcpy(to + i * 64, &x, 64);
    }
}

// ---- whole numbers of sixteen bits -----------------------------------------------------------------------------------

constexpr float ROUND_TO_WHOLE = 12582912.0f;  // 1.5 * 2**23: a sum with it is rounded to a whole number

// The largest number that `count` products with codes of `bits` bits may be made with: high bytes stay within -127 .. 127 and
// sums within int32.
inline float largest_step(int64_t count, int64_t bits) {
    const int64_t most = INT32_MAX / (count * (((int64_t)1 << bits) - 1));
    return (float)(most < 32639 ? most : 32639);
}

// x[n] (n whole lanes) in steps of the returned size, to `to`: n high bytes and then n low ones, or n int16.
inline float to_steps(const float *x, int64_t n, float largest_number, uint8_t *to) {
    Lanes most = zero();
    for (int64_t j = 0; j < n; j += 16) most = larger(most, larger(load(x + j), sub(zero(), load(x + j))));
    const float greatest = largest(most);
    const bool any = greatest > 1e-30f;
    const Lanes scale = all(any ? largest_number / greatest : 0.0f), magic = all(ROUND_TO_WHOLE);
    for (int64_t j = 0; j < n; j += 16) {
        const Lanes whole = add(mul(load(x + j), scale), magic);
#if defined(__AVX512VNNI__)
        const __m512i bits = _mm512_castps_si512(whole.v);
        _mm_storeu_si128((__m128i *)(to + j), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(128)), 8)));
        _mm_storeu_si128((__m128i *)(to + n + j), _mm512_cvtepi32_epi8(bits));
#else
        float rounded[16];
        int32_t bits[16];
        int16_t words[16];
        store(rounded, whole);
        std::memcpy(bits, rounded, sizeof bits);
        for (int i = 0; i < 16; ++i) words[i] = (int16_t)bits[i];
        std::memcpy(to + 2 * j, words, sizeof words);
#endif
    }
    return any ? greatest / largest_number : 0.0f;
}

// Rows and blocks whose sums registers hold together.
#if defined(__AVX512VNNI__)
constexpr int SCORED_ROWS = 4, WEIGHED_ROWS = 2, WEIGHED_BLOCKS = 4;
#elif defined(__AVX2__)
constexpr int SCORED_ROWS = 2, WEIGHED_ROWS = 4, WEIGHED_BLOCKS = 1;
#else
constexpr int SCORED_ROWS = 1, WEIGHED_ROWS = 1, WEIGHED_BLOCKS = 1;
#endif

// out[r * stride + t] = base[r] + step[r] * (sum over elements of code * q) for sixteen tokens, whose tiles lie
// `blocks` apart; q[r] is what to_steps made, `wide` numbers.
template <int ROWS>
inline void score_sixteen(const uint8_t *tiles, int64_t blocks, const uint8_t *q, const float *base, const float *step,
                          float *out, int64_t stride) {
    const int64_t wide = blocks * 16, quad = blocks * 64;
#if defined(__AVX512VNNI__)
    Ints acc[ROWS][4];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) acc[r][n] = no_ints();
    for (int term = 0; term < 2; ++term) {
        for (int64_t i = 0; i < blocks; ++i) {
            __m512i code[4];
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) code[n] = _mm512_loadu_si512(tiles + n * quad + i * 64);
            EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                const __m512i query = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(q + r * 2 * wide + term * wide + i * 16)));
                EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) acc[r][n].v = _mm512_dpbusd_epi32(acc[r][n].v, code[n], query);
            }
        }
        if (term == 0)
            EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
                EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) acc[r][n].v = _mm512_slli_epi32(acc[r][n].v, 8);
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        const Lanes sums = to_lanes(order_of_fours(sum_fours(acc[r][0], acc[r][1], acc[r][2], acc[r][3])));
        store(out + r * stride, mul_add(sums, all(step[r]), all(base[r])));
    }
#elif defined(__AVX2__)
    // Two tiles, eight tokens, at a time: as many sums as there are registers for.
    for (int half = 0; half < 2; ++half) {
        const __m256i none = _mm256_setzero_si256();
        __m256i acc[ROWS][4];
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) acc[r][n] = none;
        for (int64_t i = 0; i < blocks; ++i) {
            __m256i low[ROWS], high[ROWS];
            EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                const __m128i *query = (const __m128i *)(q + r * 2 * wide + i * 32);
                low[r] = _mm256_broadcastsi128_si256(_mm_loadu_si128(query));
                high[r] = _mm256_broadcastsi128_si256(_mm_loadu_si128(query + 1));
            }
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
                const __m256i code = _mm256_loadu_si256((const __m256i *)(tiles + (2 * half + n / 2) * quad + i * 64 + n % 2 * 32));
                const __m256i first = _mm256_unpacklo_epi8(code, none), second = _mm256_unpackhi_epi8(code, none);
                EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
                    acc[r][n] = _mm256_add_epi32(acc[r][n], _mm256_add_epi32(_mm256_madd_epi16(first, low[r]),
                                                                             _mm256_madd_epi16(second, high[r])));
            }
        }
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            // Of tokens 2n and 2n + 1 in either half of acc[n], to eight sums in order.
            const __m256i first = _mm256_hadd_epi32(acc[r][0], acc[r][1]), second = _mm256_hadd_epi32(acc[r][2], acc[r][3]);
            const __m256i eight = _mm256_permutevar8x32_epi32(_mm256_hadd_epi32(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            const __m256 sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(eight), _mm256_set1_ps(step[r]), _mm256_set1_ps(base[r]));
            _mm256_storeu_ps(out + r * stride + half * 8, sums);
        }
    }
#else
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        const int16_t *query = (const int16_t *)(q + r * 2 * wide);
        for (int t = 0; t < 16; ++t) {
            int32_t sum = 0;
            for (int64_t j = 0; j < wide; ++j) sum += tiles[t / 4 * quad + j / 16 * 64 + t % 4 * 16 + j % 16] * query[j];
            out[r * stride + t] = (float)sum * step[r] + base[r];
        }
    }
#endif
}

// sums[r * wide + 16 b ...] += step[r] * (sum over tokens of code * weight), for BLOCKS blocks from b on; weights[r] is what
// to_steps made, `stride` bytes from row to row and `padded` numbers.
template <int ROWS, int BLOCKS>
inline void add_tiles(const uint8_t *tiles, int64_t blocks, int64_t tokens, const uint8_t *weights, int64_t stride, int64_t padded,
                      const float *step, float *sums) {
    const int64_t wide = blocks * 16;
    (void)padded;
#if defined(__AVX512VNNI__)
    __m512i high[ROWS][BLOCKS], low[ROWS][BLOCKS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int b = 0; b < BLOCKS; ++b) high[r][b] = low[r][b] = _mm512_setzero_si512();
    for (int64_t t = 0; t < tokens; t += 4, tiles += blocks * 64) {
        __m512i code[BLOCKS];
        EBBTIDE_UNROLLED for (int b = 0; b < BLOCKS; ++b) code[b] = _mm512_loadu_si512(tiles + b * 64);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            int32_t four[2];
            std::memcpy(four, weights + r * stride + t, 4);
            std::memcpy(four + 1, weights + r * stride + padded + t, 4);
            const __m512i first = _mm512_set1_epi32(four[0]), second = _mm512_set1_epi32(four[1]);
            EBBTIDE_UNROLLED for (int b = 0; b < BLOCKS; ++b) {
                high[r][b] = _mm512_dpbusd_epi32(high[r][b], code[b], first);
                low[r][b] = _mm512_dpbusd_epi32(low[r][b], code[b], second);
            }
        }
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int b = 0; b < BLOCKS; ++b) {
            const Lanes all_of = to_lanes({_mm512_add_epi32(_mm512_slli_epi32(high[r][b], 8), low[r][b])});
            float *to = sums + r * wide + b * 16;
            store(to, mul_add(all_of, all(step[r]), load(to)));
        }
#elif defined(__AVX2__)
    static_assert(BLOCKS == 1, "sums of more blocks than one do not fit the registers");
    __m256i acc[ROWS][2];  // elements 0..3 and 8..11; 4..7 and 12..15
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t t = 0; t < tokens; t += 2, tiles += t % 4 ? 32 : blocks * 64 - 32) {
        const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)tiles));
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(tiles + 16)));
        const __m256i one = _mm256_unpacklo_epi16(a, b), two = _mm256_unpackhi_epi16(a, b);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, weights + r * stride + 2 * t, 4);
            const __m256i weight = _mm256_set1_epi32(pair);
            acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(one, weight));
            acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(two, weight));
        }
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        const __m256i first = _mm256_permute2x128_si256(acc[r][0], acc[r][1], 0x20);
        const __m256i second = _mm256_permute2x128_si256(acc[r][0], acc[r][1], 0x31);
        float *to = sums + r * wide;
        const __m256 size = _mm256_set1_ps(step[r]);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(first), size, _mm256_loadu_ps(to)));
        _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(second), size, _mm256_loadu_ps(to + 8)));
    }
#else
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        const int16_t *weight = (const int16_t *)(weights + r * stride);
        for (int j = 0; j < 16 * BLOCKS; ++j) {
            int32_t sum = 0;
            for (int64_t t = 0; t < tokens; ++t)
                sum += tiles[(t / 4 * blocks + j / 16) * 64 + t % 4 * 16 + j % 16] * weight[t];
            sums[r * wide + j] += (float)sum * step[r];
        }
    }
#endif
}

template <int ROWS>
inline void add_all_tiles(const uint8_t *tiles, int64_t blocks, int64_t tokens, const uint8_t *weights, int64_t stride,
                          int64_t padded, const float *step, float *sums) {
    int64_t b = 0;
    for (; b + WEIGHED_BLOCKS <= blocks; b += WEIGHED_BLOCKS)
        add_tiles<ROWS, WEIGHED_BLOCKS>(tiles + b * 64, blocks, tokens, weights, stride, padded, step, sums + b * 16);
    for (; b < blocks; ++b) add_tiles<ROWS, 1>(tiles + b * 64, blocks, tokens, weights, stride, padded, step, sums + b * 16);
}
