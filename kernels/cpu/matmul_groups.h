// Products of codes within a group: of weights of 8 or 4 bits, and of rows of bytes. Sixteen outputs, a strip, lie
// interleaved in memory, so that a lane is an output: one stream of addresses, no sums over lanes, and the scales of a group
// are one vector.
//
//     codes of a strip    (groups, vectors, 16 outputs, 4 inputs) bytes
//         8 bits    8 vectors; vector v holds inputs 4 v .. 4 v + 3 as int8
//         4 bits    4 vectors; vector v holds inputs 4 v .. 4 v + 3 in the low halves, 16 more in the high ones: code + 8,
//                   or of MXFP4 the file's code, which says a number
//     scales of a strip   (groups, NUMBERS, 16 outputs) float16: scales, and offsets of codes where there are two
//
// Included inside an anonymous namespace, after lanes.h, half.h and row_groups.h.

// Group8 and Group4: whole[r] is the product of a group's codes and those of ROWS rows' groups, `stride` bytes apart.
// Codes of 4 bits are multiplied as 0 .. 15, and eight times the sum of the row's codes comes off; those of MXFP4 are looked
// up, and multiplied as 0 .. 24, of which twelve times that sum comes off, or with signs where these cost nothing. Where each
// output has an offset of its own, matmul_strips.h takes it off.
struct Table {
    alignas(16) int8_t bytes[16];
};
// By its code, twice an MXFP4 number, and `more`.
constexpr Table twice_and(int more) {
    constexpr int TWICE[] = {0, 1, 2, 3, 4, 6, 8, 12};  // a code's 8 is the sign
    Table table{};
    for (int i = 0; i < 8; ++i) table.bytes[i] = (int8_t)(more + TWICE[i]), table.bytes[i + 8] = (int8_t)(more - TWICE[i]);
    return table;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Bytes for codes of 4 bits, OFFSET too much.
struct Int4 {
    static constexpr int OFFSET = 8, NUMBERS = 1;
    static __m512i bytes(__m512i codes) { return codes; }
};
struct Affine4 : Int4 {
    static constexpr int OFFSET = 0, NUMBERS = 2;
};
struct Float4 {
    static constexpr int OFFSET = 12, NUMBERS = 1;
    static constexpr Table TABLE = twice_and(OFFSET);
    static __m512i bytes(__m512i codes) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)TABLE.bytes)), codes);
    }
};

// dpbusd wants one side unsigned: the weights are, by OFFSET too much.
template <int OFFSET, int ROWS>
inline void unsigned_dots(const __m512i *v, const RowGroup *row, int64_t stride, Lanes *whole) {
    for (int r = 0; r < ROWS; ++r) {
        const RowGroup *x = apart(row, r * stride);
        __m512i total = OFFSET ? _mm512_set1_epi32(x->less_eight) : _mm512_setzero_si512();
        if (OFFSET == 128) total = _mm512_slli_epi32(total, 4);
        if (OFFSET == 12) total = _mm512_add_epi32(total, _mm512_srai_epi32(total, 1));
        for (int i = 0; i < 8; ++i) total = _mm512_dpbusd_epi32(total, v[i], _mm512_set1_epi32(x->fours[i]));
        whole[r] = {_mm512_cvtepi32_ps(total)};
    }
}
struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    static constexpr int NUMBERS = 1;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        __m512i v[8];
        for (int i = 0; i < 8; ++i) v[i] = _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * i), _mm512_set1_epi8(-128));
        unsigned_dots<128, ROWS>(v, row, stride, whole);
    }
};
template <typename Code>
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    static constexpr int NUMBERS = Code::NUMBERS;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        const __m512i low = _mm512_set1_epi8(15);
        __m512i v[8];
        for (int i = 0; i < 4; ++i) {
            const __m512i both = _mm512_loadu_si512(codes + 64 * i);
            v[i] = Code::bytes(_mm512_and_si512(both, low));
            v[i + 4] = Code::bytes(_mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
        unsigned_dots<Code::OFFSET, ROWS>(v, row, stride, whole);
    }
};
#elif defined(__AVX2__)

inline Lanes to_lanes(__m256i a, __m256i b) {
#if defined(__AVX512F__)
    return {_mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1))};
#else
    return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
#endif
}
inline __m256i load_half(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

// Bytes for codes of 4 bits, OFFSET too much.
struct Int4 {
    static constexpr int OFFSET = 8, NUMBERS = 1;
    static __m256i bytes(__m256i codes) { return codes; }
};
struct Affine4 : Int4 {
    static constexpr int OFFSET = 0, NUMBERS = 2;
};
struct Float4 {
    static constexpr int OFFSET = 12, NUMBERS = 1;
    static constexpr Table TABLE = twice_and(OFFSET);
    static __m256i bytes(__m256i codes) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)TABLE.bytes)), codes);
    }
};

// -OFFSET times the sum of the row's codes.
template <int OFFSET>
inline __m256i less(const RowGroup *row) {
    const __m256i eight = OFFSET ? _mm256_set1_epi32(row->less_eight) : _mm256_setzero_si256();
    return OFFSET == 128  ? _mm256_slli_epi32(eight, 4)
           : OFFSET == 12 ? _mm256_add_epi32(eight, _mm256_srai_epi32(eight, 1))
                          : eight;
}

#if defined(__AVXVNNI__)
// Half of a group's inputs at a time, whose codes, OFFSET too much, fill eight of sixteen registers: load(i, h) gives half h of
// vector i.
template <int OFFSET, int ROWS, typename Load>
inline void unsigned_dots(const RowGroup *row, int64_t stride, Lanes *whole, const Load &load) {
    __m256i total[ROWS][2];
    for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = less<OFFSET>(apart(row, r * stride));
    for (int first = 0; first < 8; first += 4) {
        __m256i v[4][2];
        for (int i = 0; i < 4; ++i)
            for (int h = 0; h < 2; ++h) v[i][h] = load(first + i, h);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < 4; ++i) {
                const __m256i four = _mm256_set1_epi32(apart(row, r * stride)->fours[first + i]);
                for (int h = 0; h < 2; ++h) total[r][h] = _mm256_dpbusd_avx_epi32(total[r][h], v[i][h], four);
            }
    }
    for (int r = 0; r < ROWS; ++r) whole[r] = to_lanes(total[r][0], total[r][1]);
}
struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    static constexpr int NUMBERS = 1;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        unsigned_dots<128, ROWS>(row, stride, whole, [&](int i, int h) {
            return _mm256_xor_si256(load_half(codes + 64 * i + 32 * h), _mm256_set1_epi8(-128));
        });
    }
};
template <typename Code>
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    static constexpr int NUMBERS = Code::NUMBERS;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        unsigned_dots<Code::OFFSET, ROWS>(row, stride, whole, [&](int i, int h) {
            const __m256i both = load_half(codes + 64 * (i % 4) + 32 * h);
            return Code::bytes(_mm256_and_si256(i < 4 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15)));
        });
    }
};
#else
struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    static constexpr int NUMBERS = 1;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int r = 0; r < ROWS; ++r) {
            const RowGroup *x = apart(row, r * stride);
            __m256i half[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            for (int i = 0; i < 8; ++i) {
                // maddubs wants one side unsigned: the row's magnitudes, its signs given to the weights. 2 * 127 * 127
                // is within 16 bits.
                const __m256i four = _mm256_set1_epi32(x->fours[i]), size = _mm256_abs_epi8(four);
                for (int h = 0; h < 2; ++h) {
                    const __m256i w = _mm256_sign_epi8(load_half(codes + 64 * i + 32 * h), four);
                    half[h] = _mm256_add_epi32(half[h], _mm256_madd_epi16(_mm256_maddubs_epi16(size, w), ones));
                }
            }
            whole[r] = to_lanes(half[0], half[1]);
        }
    }
};
template <typename Code>
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    static constexpr int NUMBERS = Code::NUMBERS;
    // Pairs of products that are within 16 bits together: eight of 15 * 127, four of 24 * 127.
    static constexpr int PAIRS = Code::OFFSET == 12 ? 4 : 8;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        __m256i half[2][ROWS];
        // Half a strip at a time, whose codes fill eight of sixteen registers.
        for (int h = 0; h < 2; ++h) {
            if (ROWS > 1) asm volatile("" ::: "memory");  // else GCC keeps the rows' codes for the other half, on the stack
            __m256i v[8];
            for (int i = 0; i < 4; ++i) {
                const __m256i both = load_half(codes + 64 * i + 32 * h);
                v[i] = Code::bytes(_mm256_and_si256(both, low));
                v[i + 4] = Code::bytes(_mm256_and_si256(_mm256_srli_epi16(both, 4), low));
            }
            for (int r = 0; r < ROWS; ++r) {
                const RowGroup *x = apart(row, r * stride);
                __m256i total = less<Code::OFFSET>(x);
                for (int first = 0; first < 8; first += PAIRS) {
                    __m256i pairs = _mm256_maddubs_epi16(v[first], _mm256_set1_epi32(x->fours[first]));
                    for (int i = first + 1; i < first + PAIRS; ++i)
                        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(v[i], _mm256_set1_epi32(x->fours[i])));
                    total = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), total);
                }
                half[h][r] = total;
            }
        }
        for (int r = 0; r < ROWS; ++r) whole[r] = to_lanes(half[0][r], half[1][r]);
    }
};
#endif
#elif defined(EBBTIDE_NEON)

// total + the products of four outputs' codes, eight vectors of them, with a row's.
#if defined(EBBTIDE_NEON_DOT)
inline int32x4_t add_four(int32x4_t total, const int8x16_t *w, int8x16_t x) {
    total = vdotq_laneq_s32(total, w[0], x, 0);
    total = vdotq_laneq_s32(total, w[1], x, 1);
    total = vdotq_laneq_s32(total, w[2], x, 2);
    return vdotq_laneq_s32(total, w[3], x, 3);
}
inline int32x4_t add_group(int32x4_t total, const int8x16_t *w, const RowGroup *row) {
    const int8_t *x = (const int8_t *)row->fours;
    return add_four(add_four(total, w, vld1q_s8(x)), w + 4, vld1q_s8(x + 16));
}
#else
// Pairs of products of bytes are within 16 bits, -128 * 127 twice as well, and are added to 32 bits of which two neighbours
// make an output.
inline int32x4_t add_pairs(int32x4_t total, int8x16_t w, int8x16_t other_w, int8x16_t x, int8x16_t other_x) {
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vget_low_s8(other_w), vget_low_s8(other_x));
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(w, x), other_w, other_x);
    return vaddq_s32(total, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
inline int8x16_t four_times(int32_t four) { return vreinterpretq_s8_s32(vdupq_n_s32(four)); }
inline int32x4_t add_group(int32x4_t total, const int8x16_t *w, const RowGroup *row) {
    EBBTIDE_UNROLLED for (int i = 0; i < 8; i += 2)
        total = add_pairs(total, w[i], w[i + 1], four_times(row->fours[i]), four_times(row->fours[i + 1]));
    return total;
}
#endif

struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    static constexpr int NUMBERS = 1;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
            int8x16_t w[8];
            EBBTIDE_UNROLLED for (int i = 0; i < 8; ++i) w[i] = vld1q_s8((const int8_t *)codes + 64 * i + 16 * n);
            for (int r = 0; r < ROWS; ++r)
                whole[r].v[n] = vcvtq_f32_s32(add_group(vdupq_n_s32(0), w, apart(row, r * stride)));
        }
    }
};
// Bytes for codes of 4 bits, and what a sum of their products begins with.
struct Int4 {
    static constexpr int NUMBERS = 1;
    static int8x16_t bytes(uint8x16_t codes) { return vreinterpretq_s8_u8(codes); }
    static int32_t start(const RowGroup *row) { return row->less_eight; }
};
struct Affine4 : Int4 {
    static constexpr int NUMBERS = 2;
    static int32_t start(const RowGroup *) { return 0; }
};
struct Float4 {
    static constexpr int NUMBERS = 1;
    static constexpr Table TABLE = twice_and(0);
    static int8x16_t bytes(uint8x16_t codes) { return vqtbl1q_s8(vld1q_s8(TABLE.bytes), codes); }
    static int32_t start(const RowGroup *) { return 0; }
};
template <typename Code>
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    static constexpr int NUMBERS = Code::NUMBERS;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        EBBTIDE_UNROLLED for (int n = 0; n < 4; ++n) {
            int8x16_t w[8];
            EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i) {
                const uint8x16_t both = vld1q_u8(codes + 64 * i + 16 * n);
                w[i] = Code::bytes(vandq_u8(both, vdupq_n_u8(15)));
                w[i + 4] = Code::bytes(vshrq_n_u8(both, 4));
            }
            for (int r = 0; r < ROWS; ++r) {
                const RowGroup *x = apart(row, r * stride);
                whole[r].v[n] = vcvtq_f32_s32(add_group(vdupq_n_s32(Code::start(x)), w, x));
            }
        }
    }
};
#else

struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    static constexpr int NUMBERS = 1;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        for (int r = 0; r < ROWS; ++r) {
            const int8_t *x = (const int8_t *)apart(row, r * stride)->fours;
            for (int i = 0; i < 16; ++i) {
                int32_t total = 0;
                for (int j = 0; j < 32; ++j) total += (int8_t)codes[(j / 4 * 16 + i) * 4 + j % 4] * x[j];
                whole[r].v[i] = (float)total;
            }
        }
    }
};
// A byte for a code of 4 bits, and what a sum of their products begins with.
struct Int4 {
    static constexpr int NUMBERS = 1;
    static int32_t byte(int code) { return code; }
    static int32_t start(const RowGroup *row) { return row->less_eight; }
};
struct Affine4 : Int4 {
    static constexpr int NUMBERS = 2;
    static int32_t start(const RowGroup *) { return 0; }
};
struct Float4 {
    static constexpr int NUMBERS = 1;
    static constexpr Table TABLE = twice_and(0);
    static int32_t byte(int code) { return TABLE.bytes[code]; }
    static int32_t start(const RowGroup *) { return 0; }
};
template <typename Code>
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    static constexpr int NUMBERS = Code::NUMBERS;
    template <int ROWS>
    static void dots(const uint8_t *codes, const RowGroup *row, int64_t stride, Lanes *whole) {
        for (int r = 0; r < ROWS; ++r) {
            const RowGroup *group = apart(row, r * stride);
            const int8_t *x = (const int8_t *)group->fours;
            for (int i = 0; i < 16; ++i) {
                int32_t total = Code::start(group);
                for (int j = 0; j < 16; ++j) {
                    const uint8_t both = codes[(j / 4 * 16 + i) * 4 + j % 4];
                    total += Code::byte(both & 15) * x[j] + Code::byte(both >> 4) * x[j + 16];
                }
                whole[r].v[i] = (float)total;
            }
        }
    }
};
#endif
