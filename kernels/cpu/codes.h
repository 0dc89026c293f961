// Products of queries in eight bits with the codes of many tokens, in whole numbers: exact, and so alike in every
// instruction set. Included inside an anonymous namespace, after lanes.h.
//
// Bits are 64 bytes of a plane. Sums are the products of codes (0 .. 15) with signed bytes, added four at a time; `whole`
// makes Ints of them, sixteen int32, of which each four belong to sixteen neighbouring bytes.

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Bits {
    __m512i v;
};
struct Ints {
    __m512i v;
};
inline Bits load_bits(const void *p) { return {_mm512_loadu_si512(p)}; }
inline Bits load_twice(const void *p) {
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                   _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p)));
    return {_mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 4, 0, 4, 0, 4, 0, 4))};
}
template <int WIDTH>
inline Bits part(Bits x, int i) {
    return {_mm512_and_si512(_mm512_srli_epi64(x.v, (unsigned)(i * WIDTH)), _mm512_set1_epi8((char)((1 << WIDTH) - 1)))};
}
inline Ints no_ints() { return {_mm512_setzero_si512()}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
#if defined(__AVX512VNNI__)
typedef Ints Sums;
inline Sums no_sums() { return no_ints(); }
inline Sums add_products(Sums sums, Bits codes, Bits q) { return {_mm512_dpbusd_epi32(sums.v, codes.v, q.v)}; }
inline Ints whole(Sums sums) { return sums; }
#else
struct Sums {
    __m512i v;  // int16: 8 runs of at most 2 * 15 * 127 fit
};
inline Sums no_sums() { return {_mm512_setzero_si512()}; }
inline Sums add_products(Sums sums, Bits codes, Bits q) {
    return {_mm512_add_epi16(sums.v, _mm512_maddubs_epi16(codes.v, q.v))};
}
inline Ints whole(Sums sums) { return {_mm512_madd_epi16(sums.v, _mm512_set1_epi16(1))}; }
#endif
inline Ints sum_fours(Ints a, Ints b, Ints c, Ints d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
    return {_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))};
}
inline Ints fold(Ints a, Ints b) {
    return {_mm512_add_epi32(_mm512_shuffle_i64x2(a.v, b.v, 0x88), _mm512_shuffle_i64x2(a.v, b.v, 0xDD))};
}
inline Ints order_of_fours(Ints x) {
    return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x.v)};
}
inline Ints order_of_twos(Ints x) {
    return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), x.v)};
}
inline Lanes to_lanes(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline void store_low_bytes(int8_t *p, Lanes x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_castps_si512(x.v)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Bits {
    __m256i a, b;
};
struct Ints {
    __m256i a, b;
};
struct Sums {
    __m256i a, b;  // int16: 8 runs of at most 2 * 15 * 127 fit
};
inline Bits load_bits(const void *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
inline __m256i half_twice(const void *p) {
    const __m256i twice = _mm256_permute4x64_epi64(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)), 0x50);
    return _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 4, 0, 4));
}
inline Bits load_twice(const void *p) { return {half_twice(p), half_twice((const char *)p + 16)}; }
template <int WIDTH>
inline Bits part(Bits x, int i) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << WIDTH) - 1));
    return {_mm256_and_si256(_mm256_srli_epi64(x.a, i * WIDTH), mask),
            _mm256_and_si256(_mm256_srli_epi64(x.b, i * WIDTH), mask)};
}
inline Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Sums add_products(Sums sums, Bits codes, Bits q) {
    return {_mm256_add_epi16(sums.a, _mm256_maddubs_epi16(codes.a, q.a)),
            _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(codes.b, q.b))};
}
inline Ints whole(Sums sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(sums.a, ones), _mm256_madd_epi16(sums.b, ones)};
}
inline __m256i sum_fours(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
inline Ints sum_fours(Ints w, Ints x, Ints y, Ints z) {
    return {sum_fours(w.a, x.a, y.a, z.a), sum_fours(w.b, x.b, y.b, z.b)};
}
inline __m256i fold(Ints x) {
    return _mm256_add_epi32(_mm256_permute2x128_si256(x.a, x.b, 0x20), _mm256_permute2x128_si256(x.a, x.b, 0x31));
}
inline Ints fold(Ints x, Ints y) { return {fold(x), fold(y)}; }
inline Ints order_of_twos(Ints x) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return {_mm256_permutevar8x32_epi32(x.a, order), _mm256_permutevar8x32_epi32(x.b, order)};
}
inline Ints order_of_fours(Ints x) {
    return order_of_twos({_mm256_unpacklo_epi32(x.a, x.b), _mm256_unpackhi_epi32(x.a, x.b)});
}
inline Lanes to_lanes(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void store_low_bytes(int8_t *p, Lanes x) {
    const __m256i low = _mm256_set1_epi32(255);
    const __m256i a = _mm256_and_si256(_mm256_castps_si256(x.a), low), b = _mm256_and_si256(_mm256_castps_si256(x.b), low);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#else

struct Bits {
    uint64_t v[8];
};
struct Ints {
    int32_t v[16];
};
typedef Ints Sums;
inline Bits load_bits(const void *p) {
    Bits x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Bits load_twice(const void *p) {
    Bits x;
    for (int i = 0; i < 4; ++i) {
        std::memcpy(&x.v[2 * i], (const char *)p + 8 * i, 8);
        x.v[2 * i + 1] = x.v[2 * i] >> 4;
    }
    return x;
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
inline Sums no_sums() { return no_ints(); }
inline Sums add_products(Sums sums, const Bits &codes, const Bits &q) {
    uint8_t code[64];
    int8_t query[64];
    std::memcpy(code, &codes, 64);
    std::memcpy(query, &q, 64);
    for (int i = 0; i < 64; ++i) sums.v[i / 4] += code[i] * query[i];
    return sums;
}
inline Ints whole(Sums sums) { return sums; }
inline Ints sum_fours(Ints a, Ints b, Ints c, Ints d) {
    const Ints *all[4] = {&a, &b, &c, &d};
    Ints r;
    for (int i = 0; i < 16; ++i) {
        const int32_t *x = all[i % 4]->v + i / 4 * 4;
        r.v[i] = x[0] + x[1] + x[2] + x[3];
    }
    return r;
}
inline Ints fold(Ints a, Ints b) {
    Ints r;
    for (int i = 0; i < 16; ++i) {
        const int32_t *x = (i < 8 ? a.v : b.v) + i / 4 % 2 * 8 + i % 4;
        r.v[i] = x[0] + x[4];
    }
    return r;
}
inline Ints order_of_fours(Ints x) {
    Ints r;
    for (int i = 0; i < 16; ++i) r.v[i] = x.v[i % 4 * 4 + i / 4];
    return r;
}
inline Ints order_of_twos(Ints x) {
    Ints r;
    for (int i = 0; i < 16; ++i) r.v[i] = x.v[i / 8 * 8 + i % 2 * 4 + i % 8 / 2];
    return r;
}
inline Lanes to_lanes(Ints x) {
    float all_of[16];
    for (int i = 0; i < 16; ++i) all_of[i] = (float)x.v[i];
    return load(all_of);
}
inline void store_low_bytes(int8_t *p, Lanes x) {
    float all_of[16];
    store(all_of, x);
    for (int i = 0; i < 16; ++i) p[i] = (int8_t)(float_to_bits(all_of[i]) & 255);
}

#endif

// A plane's tokens, `run` bytes each, are read in slots of 8, 16, 32 or n * 64 bytes. Slots of 8 bytes are loaded twice, the
// second time moved by half the elements of a byte, and then are slots of 16.
inline int64_t slot_of(int64_t run) {
    for (int64_t slot = 8; slot < 64; slot *= 2)
        if (run <= slot) return slot;
    return (run + 63) / 64 * 64;
}

// The bytes that `arrange_query` writes.
inline int64_t arranged_bytes(int64_t slot, int width) { return (slot < 64 ? 64 : slot) * 8 / width; }

template <int SLOT>
inline void arrange_in(const int8_t *q, int64_t parts, int8_t *to) {
    for (int64_t i = 0; i < parts; ++i)
        for (int64_t j = 0; j < 64; j += SLOT) std::memcpy(to + i * 64 + j, q + i * SLOT, SLOT);
}

// A query in eight bits, q[run * 8 / width], laid out as the elements of a plane's slots are; 0 where a slot is longer
// than a run.
inline void arrange_query(const int8_t *q, int64_t run, int64_t slot, int width, int8_t *to) {
    const int64_t parts = 8 / width;
    if (run == 16) return arrange_in<16>(q, parts, to);
    if (run == 32) return arrange_in<32>(q, parts, to);
    std::memset(to, 0, (size_t)arranged_bytes(slot, width));
    if (slot >= 64) {
        for (int64_t i = 0; i < parts; ++i) std::memcpy(to + i * slot, q + i * run, (size_t)run);
    } else if (slot == 8) {
        for (int64_t i = 0; i < parts / 2; ++i)
            for (int64_t j = 0; j < 64; j += 16) {
                std::memcpy(to + i * 64 + j, q + i * run, (size_t)run);
                std::memcpy(to + i * 64 + j + 8, q + (i + parts / 2) * run, (size_t)run);
            }
    } else {
        for (int64_t i = 0; i < parts; ++i)
            for (int64_t j = 0; j < 64; j += slot) std::memcpy(to + i * 64 + j, q + i * run, (size_t)run);
    }
}

// Tokens of `run` bytes to slots; what stands behind a token's run does not matter. Reads `slot` bytes of the last token if
// slots are shorter than 64.
inline void spread_tokens(const uint8_t *plane, int64_t run, int64_t slot, int64_t tokens, uint8_t *to) {
    switch (slot) {
        case 8:
            for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * 8, plane + t * run, 8);
            break;
        case 16:
            for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * 16, plane + t * run, 16);
            break;
        case 32:
            for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * 32, plane + t * run, 32);
            break;
        default:
            for (int64_t t = 0; t < tokens; ++t) std::memcpy(to + t * slot, plane + t * run, (size_t)run);
    }
}

// Sums over each sixteen bytes of four Bits, `step` bytes apart, for ROWS queries: lane 4 * n + i of a row's Ints holds
// that of Bits i, bytes 16 * n ...
template <int WIDTH, int PARTS, bool TWICE, int ROWS>
inline void dot_four(const uint8_t *bytes, int64_t step, const int8_t *q, int64_t part_stride, int64_t row_stride,
                     Ints *to) {
    Bits x[4];
    for (int n = 0; n < 4; ++n) x[n] = TWICE ? load_twice(bytes + n * step) : load_bits(bytes + n * step);
    for (int r = 0; r < ROWS; ++r) {
        Sums sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int i = 0; i < PARTS; ++i) {
            const Bits query = load_bits(q + r * row_stride + i * part_stride);
            for (int n = 0; n < 4; ++n) sums[n] = add_products(sums[n], part<WIDTH>(x[n], i), query);
        }
        to[r] = sum_fours(whole(sums[0]), whole(sums[1]), whole(sums[2]), whole(sums[3]));
    }
}

// to[r] = sum over a plane's elements of code * q[r], for sixteen tokens in order.
template <int WIDTH, int ROWS>
inline void dot_sixteen(const uint8_t *plane, int64_t slot, const int8_t *q, int64_t row_stride, Ints *to) {
    constexpr int PARTS = 8 / WIDTH;
    if (slot == 8) {
        dot_four<WIDTH, PARTS / 2, true, ROWS>(plane, 32, q, 64, row_stride, to);
        for (int r = 0; r < ROWS; ++r) to[r] = order_of_fours(to[r]);
    } else if (slot == 16) {
        dot_four<WIDTH, PARTS, false, ROWS>(plane, 64, q, 64, row_stride, to);
        for (int r = 0; r < ROWS; ++r) to[r] = order_of_fours(to[r]);
    } else if (slot == 32) {
        Ints second[ROWS];
        dot_four<WIDTH, PARTS, false, ROWS>(plane, 64, q, 64, row_stride, to);
        dot_four<WIDTH, PARTS, false, ROWS>(plane + 256, 64, q, 64, row_stride, second);
        for (int r = 0; r < ROWS; ++r) to[r] = order_of_twos(fold(to[r], second[r]));
    } else {
        Ints fours[4][ROWS], more[ROWS];
        for (int n = 0; n < 4; ++n) {
            const uint8_t *at = plane + 4 * n * slot;
            dot_four<WIDTH, PARTS, false, ROWS>(at, slot, q, slot, row_stride, fours[n]);
            for (int64_t j = 64; j < slot; j += 64) {
                dot_four<WIDTH, PARTS, false, ROWS>(at + j, slot, q + j, slot, row_stride, more);
                for (int r = 0; r < ROWS; ++r) fours[n][r] = add(fours[n][r], more[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            to[r] = fold(fold(fours[0][r], fours[1][r]), fold(fours[2][r], fours[3][r]));
    }
}
