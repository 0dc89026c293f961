// Products of queries in eight bits with the codes of many tokens, in whole numbers: exact, and so alike in every
// instruction set. Included inside an anonymous namespace, after lanes.h and planes.h.
//
// Bits are 64 bytes, Ints sixteen int32. A token's run of codes is read in columns of sixteen bytes: load_words takes those of
// sixteen tokens, `run` bytes apart, and to[w] holds four bytes of each, from 4 * w on, a lane to a token. Sums begin with
// Ints and grow by products of codes (0 .. 15) with signed bytes, four to a lane; whole_of ends them. to_bytes makes bytes of
// four queries: four of each in turn.

// A sum that the compiler shall not rearrange: GCC would make a tree of a chain of sums and hold all their terms in memory.
#define EBBTIDE_IN_ORDER(sum) asm("" : "+v"(sum))

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Bits {
    __m512i v;
};
struct Ints {
    __m512i v;
};
constexpr int TOGETHER = 2;  // sixteens of tokens that are worked on at once: each byte of a query is loaded for all
inline Bits four_bytes(const int8_t *p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return {_mm512_set1_epi32(bytes)};
}
inline void store_bits(void *p, Bits x) { _mm512_storeu_si512(p, x.v); }
inline __m512i four_tokens(const uint8_t *p, int64_t run) {
    if (run == 16) return _mm512_loadu_si512(p);
    const __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    const __m512i y = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + run)), 1);
    const __m512i z = _mm512_inserti32x4(y, _mm_loadu_si128((const __m128i *)(p + 2 * run)), 2);
    return _mm512_inserti32x4(z, _mm_loadu_si128((const __m128i *)(p + 3 * run)), 3);
}
EBBTIDE_INLINED void load_words(const uint8_t *p, int64_t run, Bits *to) {
    const __m512i a = four_tokens(p, run), b = four_tokens(p + 4 * run, run);
    const __m512i c = four_tokens(p + 8 * run, run), d = four_tokens(p + 12 * run, run);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    to[0] = {_mm512_unpacklo_epi64(ab, cd)};
    to[1] = {_mm512_unpackhi_epi64(ab, cd)};
    to[2] = {_mm512_unpacklo_epi64(ab_high, cd_high)};
    to[3] = {_mm512_unpackhi_epi64(ab_high, cd_high)};
}
template <int WIDTH>
inline Bits part(Bits x, int i) {
    return {_mm512_and_si512(_mm512_srli_epi64(x.v, (unsigned)(i * WIDTH)), _mm512_set1_epi8((char)((1 << WIDTH) - 1)))};
}
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
#if defined(__AVX512VNNI__)
typedef Ints Sums;
inline Sums sums_onto(Ints before) { return before; }
inline Sums add_products(Sums sums, Bits codes, Bits q) { return {_mm512_dpbusd_epi32(sums.v, codes.v, q.v)}; }
inline Ints whole_of(Sums sums, Ints) { return sums; }
#else
struct Sums {
    __m512i v;  // int16: a column's 8 sums of at most 2 * 15 * 127 fit
};
inline Sums sums_onto(Ints) { return {_mm512_setzero_si512()}; }
inline Sums add_products(Sums sums, Bits codes, Bits q) {
    sums.v = _mm512_add_epi16(sums.v, _mm512_maddubs_epi16(codes.v, q.v));
    EBBTIDE_IN_ORDER(sums.v);
    return sums;
}
inline Ints whole_of(Sums sums, Ints before) { return add(before, {_mm512_madd_epi16(sums.v, _mm512_set1_epi16(1))}); }
#endif
inline Ints sum_fours(Ints a, Ints b, Ints c, Ints d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
    return {_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))};
}
inline Ints order_of_fours(Ints x) {
    return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x.v)};
}
inline Lanes to_lanes(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Bits to_bytes(const Lanes *x) {
    const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v));
    const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v));
    return {_mm512_packs_epi16(ab, cd)};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Bits {
    __m256i a, b;
};
struct Ints {
    __m256i a, b;
};
constexpr int TOGETHER = 1;
inline Bits four_bytes(const int8_t *p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return {_mm256_set1_epi32(bytes), _mm256_set1_epi32(bytes)};
}
inline void store_bits(void *p, Bits x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
inline __m256i two_tokens(const uint8_t *p, int64_t run) {
    if (run == 16) return _mm256_loadu_si256((const __m256i *)p);
    const __m256i x = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_inserti128_si256(x, _mm_loadu_si128((const __m128i *)(p + run)), 1);
}
EBBTIDE_INLINED void half_words(const uint8_t *p, int64_t run, __m256i *to) {
    const __m256i a = two_tokens(p, run), b = two_tokens(p + 4 * run, run);
    const __m256i c = two_tokens(p + 8 * run, run), d = two_tokens(p + 12 * run, run);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    to[0] = _mm256_unpacklo_epi64(ab, cd);
    to[1] = _mm256_unpackhi_epi64(ab, cd);
    to[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
    to[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}
EBBTIDE_INLINED void load_words(const uint8_t *p, int64_t run, Bits *to) {
    __m256i a[4], b[4];
    half_words(p, run, a);
    half_words(p + 2 * run, run, b);
    for (int i = 0; i < 4; ++i) to[i] = {a[i], b[i]};
}
template <int WIDTH>
inline Bits part(Bits x, int i) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << WIDTH) - 1));
    return {_mm256_and_si256(_mm256_srli_epi64(x.a, i * WIDTH), mask),
            _mm256_and_si256(_mm256_srli_epi64(x.b, i * WIDTH), mask)};
}
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
#if defined(__AVXVNNI__)
typedef Ints Sums;
inline Sums sums_onto(Ints before) { return before; }
inline Sums add_products(Sums sums, Bits codes, Bits q) {
    return {_mm256_dpbusd_avx_epi32(sums.a, codes.a, q.a), _mm256_dpbusd_avx_epi32(sums.b, codes.b, q.b)};
}
inline Ints whole_of(Sums sums, Ints) { return sums; }
#else
struct Sums {
    __m256i a, b;  // int16: a column's 8 sums of at most 2 * 15 * 127 fit
};
inline Sums sums_onto(Ints) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Sums add_products(Sums sums, Bits codes, Bits q) {
    sums.a = _mm256_add_epi16(sums.a, _mm256_maddubs_epi16(codes.a, q.a));
    sums.b = _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(codes.b, q.b));
    EBBTIDE_IN_ORDER(sums.a);
    EBBTIDE_IN_ORDER(sums.b);
    return sums;
}
inline Ints whole_of(Sums sums, Ints before) {
    const __m256i ones = _mm256_set1_epi16(1);
    return add(before, {_mm256_madd_epi16(sums.a, ones), _mm256_madd_epi16(sums.b, ones)});
}
#endif
inline __m256i sum_fours(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
inline Ints sum_fours(Ints w, Ints x, Ints y, Ints z) {
    return {sum_fours(w.a, x.a, y.a, z.a), sum_fours(w.b, x.b, y.b, z.b)};
}
inline Ints order_of_fours(Ints x) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return {_mm256_permutevar8x32_epi32(_mm256_unpacklo_epi32(x.a, x.b), order),
            _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi32(x.a, x.b), order)};
}
inline Lanes to_lanes(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i to_bytes(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    return _mm256_packs_epi16(ab, _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d)));
}
inline Bits to_bytes(const Lanes *x) {
    return {to_bytes(x[0].a, x[1].a, x[2].a, x[3].a), to_bytes(x[0].b, x[1].b, x[2].b, x[3].b)};
}

#elif defined(EBBTIDE_NEON)

struct Bits {
    uint8x16_t v[4];
};
struct Ints {
    int32x4_t v[4];
};
constexpr int TOGETHER = 1;
typedef Ints Sums;
inline Bits four_bytes(const int8_t *p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, 4);
    const uint8x16_t all_of = vreinterpretq_u8_u32(vdupq_n_u32(bytes));
    return {{all_of, all_of, all_of, all_of}};
}
inline void store_bits(void *p, Bits x) {
    EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) vst1q_u8((uint8_t *)p + 16 * n, x.v[n]);
}
inline uint32x4_t four_words(const uint8_t *p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline uint8x16_t low_halves(uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u8_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
}
inline uint8x16_t high_halves(uint32x4_t a, uint32x4_t b) {
    return vreinterpretq_u8_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
}
EBBTIDE_INLINED void load_words(const uint8_t *p, int64_t run, Bits *to) {
    EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n, p += run) {
        const uint32x4_t a = four_words(p), b = four_words(p + 4 * run), c = four_words(p + 8 * run), d = four_words(p + 12 * run);
        const uint32x4_t ab = vzip1q_u32(a, b), cd = vzip1q_u32(c, d), ab_high = vzip2q_u32(a, b), cd_high = vzip2q_u32(c, d);
        to[0].v[n] = low_halves(ab, cd);
        to[1].v[n] = high_halves(ab, cd);
        to[2].v[n] = low_halves(ab_high, cd_high);
        to[3].v[n] = high_halves(ab_high, cd_high);
    }
}
template <int WIDTH>
inline Bits part(Bits x, int i) {
    const uint8x16_t mask = vdupq_n_u8((1 << WIDTH) - 1);
    EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) x.v[n] = (x.v[n] >> (uint8_t)(i * WIDTH)) & mask;
    return x;
}
inline Ints no_ints() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
inline Sums sums_onto(Ints before) { return before; }
inline Sums add_products(Sums sums, Bits codes, Bits q) {
    EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
        const int8x16_t code = vreinterpretq_s8_u8(codes.v[n]), query = vreinterpretq_s8_u8(q.v[n]);
#if defined(EBBTIDE_NEON_DOT)
        sums.v[n] = vdotq_s32(sums.v[n], code, query);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(code), vget_low_s8(query)), high = vmull_high_s8(code, query);
        sums.v[n] = vpadalq_s16(sums.v[n], vpaddq_s16(low, high));
#endif
    }
    return sums;
}
inline Ints whole_of(Sums sums, Ints) { return sums; }
inline Lanes to_lanes(Ints x) {
    return {{vcvtq_f32_s32(x.v[0]), vcvtq_f32_s32(x.v[1]), vcvtq_f32_s32(x.v[2]), vcvtq_f32_s32(x.v[3])}};
}
inline Bits to_bytes(const Lanes *x) {
    Bits r;
    EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
        int32x4_t whole[4];
        EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i) whole[i] = vcvtnq_s32_f32(x[i].v[n]);
        r.v[n] = vreinterpretq_u8_s8(narrowed(whole));
    }
    return r;
}

#else

struct Bits {
    uint64_t v[8];
};
struct Ints {
    int32_t v[16];
};
constexpr int TOGETHER = 1;
typedef Ints Sums;
inline Bits four_bytes(const int8_t *p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, 4);
    const uint64_t twice = bytes * 0x100000001ull;
    return {{twice, twice, twice, twice, twice, twice, twice, twice}};
}
inline void store_bits(void *p, const Bits &x) { std::memcpy(p, &x, sizeof x); }
inline void load_words(const uint8_t *p, int64_t run, Bits *to) {
    for (int t = 0; t < 16; ++t)
        for (int i = 0; i < 4; ++i) std::memcpy((uint8_t *)&to[i] + (t % 4 * 4 + t / 4) * 4, p + t * run + 4 * i, 4);
}
template <int WIDTH>
inline Bits part(Bits x, int i) {
    for (int n = 0; n < 8; ++n) x.v[n] = (x.v[n] >> (i * WIDTH)) & byte_mask<WIDTH>();
    return x;
}
inline Ints no_ints() { return {{0}}; }
inline Ints add(Ints a, Ints b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
}
inline Sums sums_onto(Ints before) { return before; }
inline Sums add_products(Sums sums, const Bits &codes, const Bits &q) {
    const uint8_t *code = (const uint8_t *)&codes;
    const int8_t *query = (const int8_t *)&q;
    int16_t products[64];  // which the compiler multiplies eight at a time
    for (int i = 0; i < 64; ++i) products[i] = (int16_t)(code[i] * query[i]);
    for (int i = 0; i < 16; ++i)
        sums.v[i] += (products[4 * i] + products[4 * i + 1]) + (products[4 * i + 2] + products[4 * i + 3]);
    return sums;
}
inline Ints whole_of(Sums sums, Ints) { return sums; }
inline Ints sum_fours(Ints a, Ints b, Ints c, Ints d) {
    const Ints *all[4] = {&a, &b, &c, &d};
    Ints r;
    for (int i = 0; i < 16; ++i) {
        const int32_t *x = all[i % 4]->v + i / 4 * 4;
        r.v[i] = x[0] + x[1] + x[2] + x[3];
    }
    return r;
}
inline Ints order_of_fours(Ints x) {
    Ints r;
    for (int i = 0; i < 16; ++i) r.v[i] = x.v[i % 4 * 4 + i / 4];
    return r;
}
inline Lanes to_lanes(Ints x) {
    float all_of[16];
    for (int i = 0; i < 16; ++i) all_of[i] = (float)x.v[i];
    return load(all_of);
}
inline Bits to_bytes(const Lanes *x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2**23: a sum with it is rounded to a whole number
    int8_t bytes[64];
    Bits r;
    for (int n = 0; n < 4; ++n) {
        float lanes[16];
        store(lanes, x[n]);
        for (int i = 0; i < 16; ++i) bytes[i / 4 * 16 + n * 4 + i % 4] = (int8_t)((lanes[i] + ROUND) - ROUND);
    }
    std::memcpy(&r, bytes, 64);
    return r;
}

#endif

// Sixteen tokens stand in the order that a transposition of four by four leaves them in.
inline int64_t lane_of_token(int64_t t) { return t / 16 * 16 + t % 4 * 4 + t / 4 % 4; }

// to[n][r] += code * query r over WORDS * 4 bytes of GROUPS times sixteen tokens. The elements that stand i * WIDTH bits up in
// a byte meet the query `part_at` elements further for each i; queries are as to_bytes makes them.
template <int WIDTH, int WORDS, int ROWS, int GROUPS>
inline void add_words(const uint8_t *tokens, int64_t run, const int8_t *q, int64_t part_at, Ints (*to)[ROWS]) {
    Bits words[GROUPS][4];
    Sums sums[GROUPS][ROWS];
    EBBTIDE_UNROLLED for (int n = 0; n < GROUPS; ++n) {
        load_words(tokens + n * 16 * run, run, words[n]);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) sums[n][r] = sums_onto(to[n][r]);
    }
    EBBTIDE_UNROLLED for (int w = 0; w < WORDS; ++w)
        EBBTIDE_UNROLLED for (int i = 0; i < 8 / WIDTH; ++i) {
            Bits codes[GROUPS];
            EBBTIDE_UNROLLED for (int n = 0; n < GROUPS; ++n) codes[n] = part<WIDTH>(words[n][w], i);
            EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                const Bits query = four_bytes(q + i * part_at * 4 + w * 16 + r * 4);
                EBBTIDE_UNROLLED for (int n = 0; n < GROUPS; ++n) sums[n][r] = add_products(sums[n][r], codes[n], query);
            }
        }
    EBBTIDE_UNROLLED for (int n = 0; n < GROUPS; ++n)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) to[n][r] = whole_of(sums[n][r], to[n][r]);
}

// to[n][r] = sum over a plane's elements of code * query r, for GROUPS times sixteen tokens of `run` bytes each, in
// lane_of_token's order. Reads up to 15 bytes behind the last.
template <int WIDTH, int ROWS, int GROUPS>
inline void dot_tokens(const uint8_t *tokens, int64_t run, const int8_t *q, int64_t part_at, Ints (*to)[ROWS]) {
    EBBTIDE_UNROLLED for (int n = 0; n < GROUPS; ++n)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) to[n][r] = no_ints();
    for (int64_t j = 0; j < run; j += 16)
        if (run - j > 8)
            add_words<WIDTH, 4, ROWS, GROUPS>(tokens + j, run, q + 4 * j, part_at, to);
        else
            add_words<WIDTH, 2, ROWS, GROUPS>(tokens + j, run, q + 4 * j, part_at, to);
}
