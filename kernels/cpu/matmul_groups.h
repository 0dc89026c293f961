// Products of weights in groups of 8 or 4 bits and rows of bytes: whole numbers within a group, float32 from group to
// group. Sixteen outputs, a strip, lie interleaved in memory, so that a lane is an output: one stream of addresses, no
// sums over lanes, and the scales of a group are one vector.
//
//     codes of a strip    (groups, vectors, 16 outputs, 4 inputs) bytes
//         8 bits    8 vectors; vector v holds inputs 4 v .. 4 v + 3 as int8
//         4 bits    4 vectors; vector v holds inputs 4 v .. 4 v + 3 in the low halves, 16 more in the high ones, code + 8
//     scales of a strip   (groups, 16 outputs) float16
//
// Included inside an anonymous namespace, after lanes.h and half.h.

// `Whole`: sixteen 32-bit whole numbers. `Group8`, `Group4`: the codes of one group, for products with rows. A group of 4
// bits is multiplied as 0 .. 15; eight times the sum of the row's codes comes off.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

template <uint32_t OFFSET>
struct Unsigned {
    __m512i v[8];
    // dpbusd wants one side unsigned: the weights are, by OFFSET too much.
    Lanes dot(const int8_t *x, int32_t sum) const {
        const int32_t *four = (const int32_t *)x;
        __m512i total = _mm512_set1_epi32((int32_t)(0u - OFFSET * (uint32_t)sum));
        for (int i = 0; i < 8; ++i) total = _mm512_dpbusd_epi32(total, v[i], _mm512_set1_epi32(four[i]));
        return {_mm512_cvtepi32_ps(total)};
    }
};
struct Group8 : Unsigned<128> {
    static constexpr int64_t BYTES = STRIP * GROUP;
    explicit Group8(const uint8_t *p) {
        for (int i = 0; i < 8; ++i) v[i] = _mm512_xor_si512(_mm512_loadu_si512(p + 64 * i), _mm512_set1_epi8(-128));
    }
};
struct Group4 : Unsigned<8> {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    explicit Group4(const uint8_t *p) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int i = 0; i < 4; ++i) {
            const __m512i both = _mm512_loadu_si512(p + 64 * i);
            v[i] = _mm512_and_si512(both, low);
            v[i + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
    }
};
constexpr int ROWS_AT_ONCE = 8;

#elif defined(__AVX2__)

inline Lanes to_lanes(__m256i a, __m256i b) {
#if defined(__AVX512F__)
    return {_mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1))};
#else
    return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
#endif
}
inline __m256i load_half(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    const uint8_t *p;
    explicit Group8(const uint8_t *p) : p(p) {}
    Lanes dot(const int8_t *x, int32_t) const {
        const int32_t *four = (const int32_t *)x;
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i a = _mm256_setzero_si256(), b = a;
        for (int i = 0; i < 8; ++i) {
            // maddubs wants one side unsigned: the row's magnitudes, its signs given to the weights. 2 * 127 * 127 is
            // within 16 bits.
            const __m256i row = _mm256_set1_epi32(four[i]), size = _mm256_abs_epi8(row);
            const __m256i wa = _mm256_sign_epi8(load_half(p + 64 * i), row);
            const __m256i wb = _mm256_sign_epi8(load_half(p + 64 * i + 32), row);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(size, wa), ones));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_maddubs_epi16(size, wb), ones));
        }
        return to_lanes(a, b);
    }
};
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    __m256i v[16];
    explicit Group4(const uint8_t *p) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int i = 0; i < 8; ++i) {
            const __m256i both = load_half(p + 32 * i);
            v[i] = _mm256_and_si256(both, low);
            v[i + 8] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
    }
    Lanes dot(const int8_t *x, int32_t sum) const {
        const int32_t *four = (const int32_t *)x;
        const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi32((int32_t)(0u - 8u * (uint32_t)sum));
        __m256i a = _mm256_setzero_si256(), b = a;
        // Eight pairs of products, 15 * 127 each at most, are within 16 bits.
        for (int i = 0; i < 8; ++i) {
            const __m256i row = _mm256_set1_epi32(four[i]);
            a = _mm256_add_epi16(a, _mm256_maddubs_epi16(v[2 * i], row));
            b = _mm256_add_epi16(b, _mm256_maddubs_epi16(v[2 * i + 1], row));
        }
        return to_lanes(_mm256_add_epi32(_mm256_madd_epi16(a, ones), offset),
                        _mm256_add_epi32(_mm256_madd_epi16(b, ones), offset));
    }
};
constexpr int ROWS_AT_ONCE = 4;

#else

struct Group8 {
    static constexpr int64_t BYTES = STRIP * GROUP;
    const int8_t *p;
    explicit Group8(const uint8_t *p) : p((const int8_t *)p) {}
    Lanes dot(const int8_t *x, int32_t) const {
        Lanes total;
        for (int i = 0; i < 16; ++i) {
            int32_t whole = 0;
            for (int j = 0; j < 32; ++j) whole += p[(j / 4 * 16 + i) * 4 + j % 4] * x[j];
            total.v[i] = (float)whole;
        }
        return total;
    }
};
struct Group4 {
    static constexpr int64_t BYTES = STRIP * GROUP / 2;
    const uint8_t *p;
    explicit Group4(const uint8_t *p) : p(p) {}
    Lanes dot(const int8_t *x, int32_t sum) const {
        Lanes total;
        for (int i = 0; i < 16; ++i) {
            int32_t whole = -8 * sum;
            for (int j = 0; j < 16; ++j) {
                const uint8_t both = p[(j / 4 * 16 + i) * 4 + j % 4];
                whole += (both & 15) * x[j] + (both >> 4) * x[j + 16];
            }
            total.v[i] = (float)whole;
        }
        return total;
    }
};
constexpr int ROWS_AT_ONCE = 4;

#endif

// One strip times ROWS rows; to[row] is 16 floats.
template <typename Group, int ROWS>
inline void strip_rows(const uint8_t *codes, const uint16_t *scales, int64_t groups, const uint8_t *bytes,
                       int64_t bytes_stride, float (*to)[STRIP]) {
    Lanes total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
        const Group weights(codes + g * Group::BYTES);
        const Lanes scale = load_f16(scales + g * STRIP);
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t *row = bytes + r * bytes_stride;
            const float *row_scales = (const float *)(row + groups * GROUP);
            const int32_t *row_sums = (const int32_t *)(row_scales + groups);
            const Lanes both = mul(scale, all(row_scales[g]));
            total[r] = mul_add(weights.dot((const int8_t *)row + g * GROUP, row_sums[g]), both, total[r]);
        }
    }
    for (int r = 0; r < ROWS; ++r) store(to[r], total[r]);
}

template <typename Group>
void multiply_strips(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    constexpr int64_t BLOCK_BYTES = 256 << 10;  // of rows, which stay in the second cache for all strips
    const int64_t groups = num_groups(m.in), each = row_bytes(m.in);
    int64_t block = BLOCK_BYTES / each / ROWS_AT_ONCE * ROWS_AT_ONCE;
    if (block < ROWS_AT_ONCE) block = ROWS_AT_ONCE;
    // Outputs counted from the start of the first strip.
    const int64_t from = begin + m.first, to = end + m.first;
    for (int64_t top = 0; top < rows.count; top += block) {
        const int64_t bottom = top + block < rows.count ? top + block : rows.count;
        for (int64_t strip = from / STRIP; strip * STRIP < to; ++strip) {
            const uint8_t *codes = (const uint8_t *)m.weight + strip * groups * Group::BYTES;
            const uint16_t *scales = m.scales + strip * groups * STRIP;
            const int64_t low = from > strip * STRIP ? from - strip * STRIP : 0;
            const int64_t high = to < (strip + 1) * STRIP ? to - strip * STRIP : STRIP;
            float part[ROWS_AT_ONCE][STRIP];
            for (int64_t row = top, done; row < bottom; row += done) {
                const uint8_t *bytes = rows.bytes + row * each;
                if (bottom - row >= ROWS_AT_ONCE) {
                    strip_rows<Group, ROWS_AT_ONCE>(codes, scales, groups, bytes, each, part);
                    done = ROWS_AT_ONCE;
                } else if (bottom - row >= 2) {
                    strip_rows<Group, 2>(codes, scales, groups, bytes, each, part);
                    done = 2;
                } else {
                    strip_rows<Group, 1>(codes, scales, groups, bytes, each, part);
                    done = 1;
                }
                for (int64_t r = 0; r < done; ++r)
                    std::memcpy(out + (row + r) * stride + strip * STRIP + low - m.first, part[r] + low,
                                (size_t)(high - low) * sizeof(float));
            }
        }
    }
}
