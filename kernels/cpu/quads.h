// Products of a page's codes, in tiles, with whole numbers of sixteen bits. All products are exact sums of int32, and so alike in
// every instruction set. Where bytes are multiplied (BYTE_PRODUCTS) a number is two of them, 256 * high + low. Included inside
// an anonymous namespace, after tiles.h.

constexpr float ROUND_TO_WHOLE = 12582912.0f;  // 1.5 * 2**23: a sum with it is rounded to a whole number

// The largest number that `count` products with codes of `bits` bits may be made with: high bytes stay within -127 .. 127 and
// sums within int32.
inline float largest_step(int64_t count, int64_t bits) {
    const int64_t most = INT32_MAX / (count * (((int64_t)1 << bits) - 1));
    return (float)(most < 32639 ? most : 32639);
}

// Sixteen whole numbers, to which ROUND_TO_WHOLE was added, as those j .. j + 15 of the n at `to`: n high bytes and then n low
// ones, or n int16.
inline void store_numbers(Lanes whole, uint8_t *to, int64_t j, int64_t n) {
    (void)n;
#if defined(__AVX512VNNI__)
    const __m512i bits = _mm512_castps_si512(whole.v);
    _mm_storeu_si128((__m128i *)(to + j), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(128)), 8)));
    _mm_storeu_si128((__m128i *)(to + n + j), _mm512_cvtepi32_epi8(bits));
#elif defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)(to + 2 * j), _mm512_cvtepi32_epi16(_mm512_castps_si512(whole.v)));
#elif defined(__AVX2__)
    const __m256i low = _mm256_set1_epi32(0xffff);
    const __m256i a = _mm256_and_si256(_mm256_castps_si256(whole.a), low), b = _mm256_and_si256(_mm256_castps_si256(whole.b), low);
    _mm256_storeu_si256((__m256i *)(to + 2 * j), _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8));
#elif defined(EBBTIDE_NEON_DOT)
    EBBTIDE_UNROLLED for (int i = 0; i < 4; i += 2) {
        const uint32x4_t a = vreinterpretq_u32_f32(whole.v[i]), b = vreinterpretq_u32_f32(whole.v[i + 1]);
        const int16x8_t words = vreinterpretq_s16_u16(vcombine_u16(vmovn_u32(a), vmovn_u32(b)));
        vst1_s8((int8_t *)to + j + 4 * i, vrshrn_n_s16(words, 8));
        vst1_s8((int8_t *)to + n + j + 4 * i, vmovn_s16(words));
    }
#elif defined(EBBTIDE_NEON)
    EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i) vst1_u16((uint16_t *)(to + 2 * j) + 4 * i, vmovn_u32(vreinterpretq_u32_f32(whole.v[i])));
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

#if defined(__AVX512VNNI__)
// Four times sixteen whole numbers: high bytes at `to`, low ones n behind. Packing interleaves runs of four, which is undone in the end.
inline void store_sixty_four(const __m512i *of, uint8_t *to, int64_t n) {
    const __m512i a = _mm512_packs_epi32(of[0], of[1]), b = _mm512_packs_epi32(of[2], of[3]);
    const __m512i half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    const __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8), _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
    const __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, high));
    _mm512_storeu_si512(to + n, _mm512_permutexvar_epi32(order, low));
}
#endif

// Rows of x, n numbers each and `stride` apart, to what products with the codes of lo + code * scale take: x * lo, added up, in
// base[r], and x * scale as whole numbers of steps of step[r]. lo and scale have zeros behind their n, to whole lanes; so have the
// numbers, two bytes each, row after row.
template <int ROWS>
inline void to_steps(const float *x, int64_t stride, int64_t n, const float *lo, const float *scale, float largest_number, float *base,
                     float *step, uint8_t *numbers) {
    const int64_t whole = n / 16 * 16, wide = whole_lanes(n);
    float end[ROWS][16], rest[ROWS];  // what fills no lanes, and zeros
    if (whole < n)
        for (int r = 0; r < ROWS; ++r) {
            rest[r] = 0;
            std::memset(end[r], 0, sizeof end[r]);
            for (int64_t j = whole; j < n; ++j) {
                end[r][j - whole] = x[r * stride + j];
                rest[r] += x[r * stride + j] * lo[j];
            }
        }
    Lanes along[ROWS], most[ROWS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) along[r] = most[r] = zero();
    for (int64_t j = 0; j < whole; j += 16) {
        const Lanes low = load(lo + j), size = load(scale + j);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            const Lanes number = load(x + r * stride + j);
            along[r] = mul_add(number, low, along[r]);
            most[r] = larger(most[r], magnitude(mul(number, size)));
        }
    }
    if (whole < n)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) most[r] = larger(most[r], magnitude(mul(load(end[r]), load(scale + whole))));
    float greatest[ROWS];
    sum_each<ROWS>(along, base);
    largest_each<ROWS>(most, greatest);
    Lanes steps[ROWS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        if (whole < n) base[r] += rest[r];
        const bool any = greatest[r] > 1e-30f;
        step[r] = any ? greatest[r] / largest_number : 0.0f;
        steps[r] = all(any ? largest_number / greatest[r] : 0.0f);
    }
    const Lanes magic = all(ROUND_TO_WHOLE);
    int64_t j = 0;
#if defined(__AVX512VNNI__)
    for (; j + 64 <= whole; j += 64)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            __m512i of[4];
            EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i)
                of[i] = _mm512_cvtps_epi32(mul(mul(load(x + r * stride + j + 16 * i), load(scale + j + 16 * i)), steps[r]).v);
            store_sixty_four(of, numbers + r * 2 * wide + j, wide);
        }
#endif
    for (; j < whole; j += 16) {
        const Lanes size = load(scale + j);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
            store_numbers(add(mul(mul(load(x + r * stride + j), size), steps[r]), magic), numbers + r * 2 * wide, j, wide);
    }
    if (whole < n)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
            store_numbers(add(mul(mul(load(end[r]), load(scale + whole)), steps[r]), magic), numbers + r * 2 * wide, whole, wide);
}

// Rows and blocks whose sums registers hold together.
#if defined(__AVX512VNNI__)
constexpr int SCORED_ROWS = 4, WEIGHED_ROWS = 2, WEIGHED_BLOCKS = 4;
#elif defined(EBBTIDE_NEON_DOT)
constexpr int SCORED_ROWS = 4, WEIGHED_ROWS = 3, WEIGHED_BLOCKS = 1;
#elif defined(__AVX2__)
constexpr int SCORED_ROWS = 2, WEIGHED_ROWS = 4, WEIGHED_BLOCKS = 1;
#elif defined(EBBTIDE_NEON)
constexpr int SCORED_ROWS = 4, WEIGHED_ROWS = 4, WEIGHED_BLOCKS = 1;
#else
constexpr int SCORED_ROWS = 1, WEIGHED_ROWS = 1, WEIGHED_BLOCKS = 1;
#endif

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Products of words, two to a sum.
inline __m256i add_words(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
#elif defined(EBBTIDE_NEON_DOT)
// 128 * the sum of n numbers (high bytes and then low ones), of which each lane has a part: what tiles lack that hold codes - 128.
inline int32x4_t times_128(const int8_t *x, int64_t n) {
    int32x4_t high = vdupq_n_s32(0), low = high;
    for (int64_t j = 0; j < n; j += 16) {
        high = vdotq_s32(high, vld1q_s8(x + j), vdupq_n_s8(64));
        low = vdotq_s32(low, vld1q_s8(x + n + j), vdupq_n_s8(64));
    }
    return vshlq_n_s32(vaddq_s32(vshlq_n_s32(high, 8), low), 1);
}
inline int8x16_t four_times(const uint8_t *p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_s8_u32(vdupq_n_u32(four));
}
#elif defined(EBBTIDE_NEON)
inline int32x4_t add_words(int32x4_t sum, int16x8_t a, int16x8_t b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}
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
                    acc[r][n] = add_words(add_words(acc[r][n], first, low[r]), second, high[r]);
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
#elif defined(EBBTIDE_NEON)
#if defined(EBBTIDE_NEON_DOT)
    int32x4_t start[ROWS];  // of every token, as tiles hold codes - 128: 128 times the query
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) start[r] = times_128((const int8_t *)q + r * 2 * wide, wide);
#endif
    for (int n = 0; n < 4; ++n, tiles += quad) {  // four tokens
        int32x4_t acc[ROWS][4];
#if defined(EBBTIDE_NEON_DOT)
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
            EBBTIDE_UNROLLED for (int t = 0; t < 4; ++t) acc[r][t] = vdupq_n_s32(0);
        for (int term = 0; term < 2; ++term) {
            for (int64_t i = 0; i < blocks; ++i) {
                int8x16_t code[4];
                EBBTIDE_UNROLLED for (int t = 0; t < 4; ++t) code[t] = vld1q_s8((const int8_t *)tiles + i * 64 + t * 16);
                EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                    const int8x16_t query = vld1q_s8((const int8_t *)q + r * 2 * wide + term * wide + i * 16);
                    EBBTIDE_UNROLLED for (int t = 0; t < 4; ++t) acc[r][t] = vdotq_s32(acc[r][t], code[t], query);
                }
            }
            EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
                EBBTIDE_UNROLLED for (int t = 0; t < 4; ++t)
                    acc[r][t] = term ? vaddq_s32(acc[r][t], start[r]) : vshlq_n_s32(acc[r][t], 8);
        }
#else
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
            EBBTIDE_UNROLLED for (int t = 0; t < 4; ++t) acc[r][t] = vdupq_n_s32(0);
        for (int64_t i = 0; i < blocks; ++i)
            EBBTIDE_UNROLLED for (int t = 0; t < 4; ++t) {
                const uint8x16_t code = vld1q_u8(tiles + i * 64 + t * 16);
                const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(code)));
                const int16x8_t second = vreinterpretq_s16_u16(vmovl_high_u8(code));
                EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                    const int16_t *query = (const int16_t *)(q + r * 2 * wide) + i * 16;
                    acc[r][t] = add_words(acc[r][t], first, vld1q_s16(query));
                    acc[r][t] = add_words(acc[r][t], second, vld1q_s16(query + 8));
                }
            }
#endif
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            const int32x4_t sums = vpaddq_s32(vpaddq_s32(acc[r][0], acc[r][1]), vpaddq_s32(acc[r][2], acc[r][3]));
            vst1q_f32(out + r * stride + 4 * n, vfmaq_n_f32(vdupq_n_f32(base[r]), vcvtq_f32_s32(sums), step[r]));
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
                      const float *step, float *sums, Ahead &later) {
    const int64_t wide = blocks * 16;
    Ahead ahead = later;  // which registers hold
    (void)padded;
#if defined(__AVX512VNNI__)
    __m512i high[ROWS][BLOCKS], low[ROWS][BLOCKS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int b = 0; b < BLOCKS; ++b) high[r][b] = low[r][b] = _mm512_setzero_si512();
    for (int64_t t = 0; t < tokens; t += 4, tiles += blocks * 64) {
        ahead.step();
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
    __m256i acc[ROWS][2];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t t = 0; t < tokens; t += 4, tiles += blocks * 64) {
        ahead.step();
        EBBTIDE_UNROLLED for (int half = 0; half < 2; ++half) {
            const __m128i a = _mm_loadu_si128((const __m128i *)(tiles + half * 32));
            const __m128i b = _mm_loadu_si128((const __m128i *)(tiles + half * 32 + 16));
            const __m256i one = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), two = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
            EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                std::memcpy(&pair, weights + r * stride + 2 * t + 4 * half, 4);
                const __m256i weight = _mm256_set1_epi32(pair);
                acc[r][0] = add_words(acc[r][0], one, weight);
                acc[r][1] = add_words(acc[r][1], two, weight);
            }
        }
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        float *to = sums + r * wide;
        const __m256 size = _mm256_set1_ps(step[r]);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][0]), size, _mm256_loadu_ps(to)));
        _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][1]), size, _mm256_loadu_ps(to + 8)));
    }
#elif defined(EBBTIDE_NEON_DOT)
    static_assert(BLOCKS == 1, "sums of more blocks than one do not fit the registers");
    int32x4_t high[ROWS][4], low[ROWS][4], start[ROWS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        start[r] = vdupq_n_s32(vaddvq_s32(times_128((const int8_t *)weights + r * stride, padded)));
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) high[r][n] = low[r][n] = vdupq_n_s32(0);
    }
    for (int64_t t = 0; t < tokens; t += 4, tiles += blocks * 64) {
        ahead.step();
        const uint16x8_t a = vld1q_u16((const uint16_t *)tiles), b = vld1q_u16((const uint16_t *)tiles + 8);
        const uint16x8_t c = vld1q_u16((const uint16_t *)tiles + 16), d = vld1q_u16((const uint16_t *)tiles + 24);
        const int8x16_t code[4] = {vreinterpretq_s8_u16(vzip1q_u16(a, c)), vreinterpretq_s8_u16(vzip2q_u16(a, c)),
                                   vreinterpretq_s8_u16(vzip1q_u16(b, d)), vreinterpretq_s8_u16(vzip2q_u16(b, d))};
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            const int8x16_t first = four_times(weights + r * stride + t), second = four_times(weights + r * stride + padded + t);
            EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
                high[r][n] = vdotq_s32(high[r][n], code[n], first);
                low[r][n] = vdotq_s32(low[r][n], code[n], second);
            }
        }
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
            const int32x4_t all_of = vaddq_s32(vaddq_s32(vshlq_n_s32(high[r][n], 8), low[r][n]), start[r]);
            float *to = sums + r * wide + 4 * n;
            vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), vcvtq_f32_s32(all_of), step[r]));
        }
#elif defined(EBBTIDE_NEON)
    static_assert(BLOCKS == 1, "sums of more blocks than one do not fit the registers");
    int32x4_t acc[ROWS][4];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) acc[r][n] = vdupq_n_s32(0);
    for (int64_t t = 0; t < tokens; ++t, tiles += t % 4 ? 16 : blocks * 64 - 48) {
        if (t % 4 == 0) ahead.step();
        const uint8x16_t code = vld1q_u8(tiles);
        const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(code)));
        const int16x8_t second = vreinterpretq_s16_u16(vmovl_high_u8(code));
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
            const int16_t weight = ((const int16_t *)(weights + r * stride))[t];
            acc[r][0] = vmlal_n_s16(acc[r][0], vget_low_s16(first), weight);
            acc[r][1] = vmlal_high_n_s16(acc[r][1], first, weight);
            acc[r][2] = vmlal_n_s16(acc[r][2], vget_low_s16(second), weight);
            acc[r][3] = vmlal_high_n_s16(acc[r][3], second, weight);
        }
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
            float *to = sums + r * wide + 4 * n;
            vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), vcvtq_f32_s32(acc[r][n]), step[r]));
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
    later = ahead;
}

// How often add_all_tiles takes a step of `ahead` for one block of rows.
inline int64_t num_tile_steps(int64_t tokens, int64_t blocks) {
    return (tokens + 3) / 4 * (blocks / WEIGHED_BLOCKS + blocks % WEIGHED_BLOCKS);
}

template <int ROWS>
inline void add_all_tiles(const uint8_t *tiles, int64_t blocks, int64_t tokens, const uint8_t *weights, int64_t stride,
                          int64_t padded, const float *step, float *sums, Ahead &ahead) {
    int64_t b = 0;
    for (; b + WEIGHED_BLOCKS <= blocks; b += WEIGHED_BLOCKS)
        add_tiles<ROWS, WEIGHED_BLOCKS>(tiles + b * 64, blocks, tokens, weights, stride, padded, step, sums + b * 16, ahead);
    for (; b < blocks; ++b) add_tiles<ROWS, 1>(tiles + b * 64, blocks, tokens, weights, stride, padded, step, sums + b * 16, ahead);
}

#if defined(__AMX_INT8__)
#include "quads_amx.h"
#endif

// out[r * stride + t] for all tokens of a page and `rows` rows of numbers; `room` has as many bytes as tiles.
inline void score_page(const uint8_t *tiles, int64_t blocks, int64_t tokens, const uint8_t *q, int64_t rows, const float *base,
                       const float *step, float *out, int64_t stride, uint8_t *room, Ahead &ahead) {
    int64_t done = 0;
#if defined(__AMX_INT8__)
    done = score_by_amx(tiles, blocks, tokens, q, rows, base, step, out, stride, room, ahead);
#endif
    (void)room;
    by_rows<SCORED_ROWS>(rows - done, [&](auto count, int64_t r) {
        r += done;
        for (int64_t t = 0; t < tokens; t += 16, ahead.step())
            score_sixteen<decltype(count)::VALUE>(tiles + t / 4 * blocks * 64, blocks, q + r * 2 * blocks * 16, base + r, step + r,
                                                  out + r * stride + t, stride);
    });
}

// sums[r] += the products of a page's values and `rows` rows of weights.
inline void add_page(const uint8_t *tiles, int64_t blocks, int64_t tokens, const uint8_t *weights, int64_t padded, int64_t rows,
                     const float *step, float *sums, Ahead &ahead) {
    int64_t done = 0;
#if defined(__AMX_INT8__)
    done = add_by_amx(tiles, blocks, weights, padded, rows, step, sums, ahead);
#endif
    by_rows<WEIGHED_ROWS>(rows - done, [&](auto count, int64_t r) {
        r += done;
        add_all_tiles<decltype(count)::VALUE>(tiles, blocks, tokens, weights + r * 2 * padded, 2 * padded, padded, step + r,
                                              sums + r * blocks * 16, ahead);
    });
}
