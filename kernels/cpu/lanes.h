// Sixteen float32 lanes, in the instruction set of the file that includes this. The order in which lanes are added
// is the same everywhere; only the fused multiply-add of AVX2 and AVX-512 rounds once where portable code rounds
// twice. Included inside an anonymous namespace, so that no two instruction sets share a symbol.

// Sums stay in registers only where the loops over them are gone early. Without a number clang takes ten minutes for a file, where
// it compiles for Apple's processors.
#if defined(__GNUC__) && !defined(__clang__)
#define EBBTIDE_UNROLLED _Pragma("GCC unroll 8")
#else
#define EBBTIDE_UNROLLED _Pragma("unroll 8")
#endif

// What takes several vectors: a call would send all of them, and whatever else its caller holds, through memory.
#define EBBTIDE_INLINED inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Lanes {
    __m512 v;
};
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes all_whole(int32_t n) { return {_mm512_cvtepi32_ps(_mm512_set1_epi32(n))}; }
inline Lanes load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline void store(float *p, Lanes a) { _mm512_storeu_ps(p, a.v); }
// p[0], p[1], p[0] and so on.
inline Lanes alternating(const float *p) {
    double both;
    std::memcpy(&both, p, sizeof both);
    return {_mm512_castpd_ps(_mm512_set1_pd(both))};
}
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes mul_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes divided(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.v)}; }
// 32 lanes, rounded to whole numbers, as bytes; their sum.
inline int32_t store_codes(Lanes a, Lanes b, int8_t *to) {
    const __m512i whole_a = _mm512_cvtps_epi32(a.v), whole_b = _mm512_cvtps_epi32(b.v);
    _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(whole_a));
    _mm_storeu_si128((__m128i *)to + 1, _mm512_cvtsepi32_epi8(whole_b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(whole_a, whole_b));
}
inline Lanes add_exponent(Lanes a, Lanes n) {
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}
inline __m256 halved(Lanes a) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
}
inline __m256 larger_half(Lanes a) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
    return _mm256_max_ps(_mm512_castps512_ps256(a.v), high);
}
inline Lanes load_bf16(const void *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Lanes load_f16(const void *p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }
inline Lanes load_u8(const uint8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Lanes {
    __m256 a, b;
};
inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes all_whole(int32_t n) {
    const __m256 eight = _mm256_cvtepi32_ps(_mm256_set1_epi32(n));
    return {eight, eight};
}
inline Lanes load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, Lanes x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Lanes alternating(const float *p) {
    double both;
    std::memcpy(&both, p, sizeof both);
    const __m256 one = _mm256_castpd_ps(_mm256_set1_pd(both));
    return {one, one};
}
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes mul_add(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Lanes sub(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes divided(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes larger(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline __m256 magnitude(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Lanes magnitude(Lanes x) { return {magnitude(x.a), magnitude(x.b)}; }
inline __m128i as_bytes(__m256i a, __m256i b) {
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}
inline int32_t store_codes(Lanes x, Lanes y, int8_t *to) {
    const __m256i xa = _mm256_cvtps_epi32(x.a), xb = _mm256_cvtps_epi32(x.b);
    const __m256i ya = _mm256_cvtps_epi32(y.a), yb = _mm256_cvtps_epi32(y.b);
    _mm_storeu_si128((__m128i *)to, as_bytes(xa, xb));
    _mm_storeu_si128((__m128i *)to + 1, as_bytes(ya, yb));
    const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(xa, xb), _mm256_add_epi32(ya, yb));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}
inline __m256 add_exponent(__m256 a, __m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
inline Lanes add_exponent(Lanes x, Lanes n) { return {add_exponent(x.a, n.a), add_exponent(x.b, n.b)}; }
inline __m256 halved(Lanes x) { return _mm256_add_ps(x.a, x.b); }
inline __m256 larger_half(Lanes x) { return _mm256_max_ps(x.a, x.b); }
inline __m256 half_bf16(const uint8_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Lanes load_bf16(const void *p) { return {half_bf16((const uint8_t *)p), half_bf16((const uint8_t *)p + 16)}; }
inline Lanes load_f16(const void *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
}
inline Lanes load_u8(const uint8_t *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}

#elif defined(EBBTIDE_NEON)

#include "lanes_neon.h"

#else

struct Lanes {
    float v[16];
};
inline Lanes all(float x) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = x;
    return r;
}
inline Lanes all_whole(int32_t n) { return all((float)n); }
inline Lanes zero() { return all(0.0f); }
inline Lanes load(const float *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
}
inline void store(float *p, Lanes a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline Lanes alternating(const float *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i % 2];
    return r;
}
inline Lanes add(Lanes a, Lanes b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
}
inline Lanes mul(Lanes a, Lanes b) {
    for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
    return a;
}
inline Lanes mul_add(Lanes a, Lanes b, Lanes c) {
    for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] * b.v[i] + c.v[i];
    return a;
}
inline Lanes sub(Lanes a, Lanes b) {
    for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
    return a;
}
inline Lanes divided(Lanes a, Lanes b) {
    for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
    return a;
}
inline Lanes larger(Lanes a, Lanes b) {
    for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline Lanes magnitude(Lanes a) {
    for (int i = 0; i < 16; ++i) a.v[i] = std::fabs(a.v[i]);
    return a;
}
inline int32_t store_codes(Lanes a, Lanes b, int8_t *to) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
        // What is not finite gives zero: the group's scale says it.
        const float x = i < 16 ? a.v[i] : b.v[i - 16];
        to[i] = (int8_t)(x >= -127.5f && x <= 127.5f ? std::nearbyintf(x) : 0.0f);
        sum += to[i];
    }
    return sum;
}
inline Lanes add_exponent(Lanes a, Lanes n) {
    for (int i = 0; i < 16; ++i) a.v[i] = bits_to_float(float_to_bits(a.v[i]) + (float_to_bits(n.v[i]) << 23));
    return a;
}
inline Lanes load_bf16(const void *p) {
    uint16_t bits[16];
    std::memcpy(bits, p, sizeof bits);
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = bf16_to_float(bits[i]);
    return r;
}
inline Lanes load_f16(const void *p) {
    uint16_t bits[16];
    std::memcpy(bits, p, sizeof bits);
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = half_to_float(bits[i]);
    return r;
}
inline Lanes load_u8(const uint8_t *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
}

#endif

// Each of four vectors to the sum of its lanes. All orders are this one: lanes i and i + 8; of those i and i + 2 in each
// run of four, then i and i + 1; then the two runs.
EBBTIDE_INLINED void sum_four(Lanes a, Lanes b, Lanes c, Lanes d, float *out) {
#if defined(__AVX2__)
    const __m256 a8 = halved(a), b8 = halved(b), c8 = halved(c), d8 = halved(d);
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));  // a02 b02 a13 b13
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8));
    const __m256 low = _mm256_shuffle_ps(ab, cd, 0x44), high = _mm256_shuffle_ps(ab, cd, 0xEE);
    const __m256 runs = _mm256_add_ps(low, high);  // a b c d of the first run, then of the second
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(runs), _mm256_extractf128_ps(runs, 1)));
#elif defined(EBBTIDE_NEON)
    out[0] = sum_one(a), out[1] = sum_one(b), out[2] = sum_one(c), out[3] = sum_one(d);
#else
    const Lanes *all[4] = {&a, &b, &c, &d};
    for (int n = 0; n < 4; ++n) {
        const float *x = all[n]->v;
        float v[8];
        for (int i = 0; i < 8; ++i) v[i] = x[i] + x[i + 8];
        out[n] = ((v[0] + v[2]) + (v[1] + v[3])) + ((v[4] + v[6]) + (v[5] + v[7]));
    }
#endif
}

// Lanes i, i + 4, i + 8 and i + 12 together, for i of 0 .. 3.
inline void sum_runs(Lanes a, float *out) {
#if defined(__AVX2__)
    const __m256 half = halved(a);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(EBBTIDE_NEON)
    vst1q_f32(out, vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3])));
#else
    for (int i = 0; i < 4; ++i) out[i] = (a.v[i] + a.v[i + 8]) + (a.v[i + 4] + a.v[i + 12]);
#endif
}

inline float sum(Lanes a) {
    float out[4];
    sum_four(a, a, a, a, out);
    return out[0];
}

// Each of four vectors to the largest of its lanes.
EBBTIDE_INLINED void largest_four(Lanes a, Lanes b, Lanes c, Lanes d, float *out) {
#if defined(__AVX2__)
    const __m256 a8 = larger_half(a), b8 = larger_half(b), c8 = larger_half(c), d8 = larger_half(d);
    const __m256 ab = _mm256_max_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));
    const __m256 cd = _mm256_max_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8));
    const __m256 runs = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(runs), _mm256_extractf128_ps(runs, 1)));
#elif defined(EBBTIDE_NEON)
    out[0] = largest_one(a), out[1] = largest_one(b), out[2] = largest_one(c), out[3] = largest_one(d);
#else
    const Lanes *all[4] = {&a, &b, &c, &d};
    for (int n = 0; n < 4; ++n) {
        out[n] = all[n]->v[0];
        for (int i = 1; i < 16; ++i) out[n] = out[n] > all[n]->v[i] ? out[n] : all[n]->v[i];
    }
#endif
}

inline float largest(Lanes a) {
    float out[4];
    largest_four(a, a, a, a, out);
    return out[0];
}

// Each of ROWS vectors, at most four, to the sum of its lanes, or to the largest.
template <int ROWS>
EBBTIDE_INLINED void sum_each(const Lanes *a, float *out) {
    float four[4];
    sum_four(a[0], a[1 % ROWS], a[2 % ROWS], a[3 % ROWS], four);
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) out[r] = four[r];
}
template <int ROWS>
EBBTIDE_INLINED void largest_each(const Lanes *a, float *out) {
    float four[4];
    largest_four(a[0], a[1 % ROWS], a[2 % ROWS], a[3 % ROWS], four);
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) out[r] = four[r];
}

// exp(x) for x <= 0; at and below -87, where float32 still holds it, exp(-87) = 1.6e-38. Within 2 ulp.
inline Lanes exp_lanes(Lanes x) {
    // 1.5 * 2**23: a sum with it is rounded to a whole number, which then stands in the low bits of the sum.
    const Lanes magic = all(12582912.0f);
    x = larger(x, all(-87.0f));
    const Lanes shifted = mul_add(x, all(1.44269504f), magic);  // log2(e)
    const Lanes n = sub(shifted, magic);
    // ln(2) in two parts; the first has few bits, so that n times it is exact.
    const Lanes r = mul_add(n, all(-1.42860677e-6f), mul_add(n, all(-0.693145752f), x));  // |r| <= ln(2) / 2
    Lanes p = all(1.0f / 5040);  // Taylor: the next term is below 6e-9
    p = mul_add(p, r, all(1.0f / 720));
    p = mul_add(p, r, all(1.0f / 120));
    p = mul_add(p, r, all(1.0f / 24));
    p = mul_add(p, r, all(1.0f / 6));
    p = mul_add(p, r, all(0.5f));
    p = mul_add(mul_add(p, r, all(1.0f)), r, all(1.0f));
    return add_exponent(p, shifted);
}

// Each x to 2**x, for x <= 0; at most 2**-125 where it is below -126. Within 3e-6 of it: for estimates. Step by step for all N, as
// the products of each wait for one another.
template <int N>
inline void exp2_all(Lanes *x) {
    const Lanes magic = all(12582912.0f);  // see exp_lanes
    Lanes shifted[N], r[N];
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) x[i] = larger(x[i], all(-126.0f));
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) shifted[i] = add(x[i], magic);
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) r[i] = sub(x[i], sub(shifted[i], magic));  // |r| <= 1/2
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) x[i] = mul_add(all(9.58285344e-3f), r[i], all(5.59064271e-2f));
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) x[i] = mul_add(x[i], r[i], all(2.40240986e-1f));
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) x[i] = mul_add(x[i], r[i], all(6.93124193e-1f));
    EBBTIDE_UNROLLED for (int i = 0; i < N; ++i) x[i] = add_exponent(mul_add(x[i], r[i], all(1.0f)), shifted[i]);
}

// The logarithm of a number from 1 on, within 2e-7 or 1 ulp: of m, which is x without a power of two and next to 1, by the
// series of the inverse hyperbolic tangent. A compiler makes vectors of it.
inline float log_from_one(float x) {
    const int32_t exponent = ((int32_t)float_to_bits(x) - 0x3F3504F3) >> 23;  // 1 / sqrt(2)
    const float m = bits_to_float(float_to_bits(x) - ((uint32_t)exponent << 23));
    const float s = (m - 1) / (m + 1), square = s * s;
    const float series = ((square * (1.0f / 7) + 1.0f / 5) * square + 1.0f / 3) * square;
    return (float)exponent * 0.693147181f + 2 * (s + s * series);
}
