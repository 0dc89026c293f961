// Sixteen float32 lanes, in the instruction set of the file that includes this. The order in which lanes are added
// is the same everywhere; only the fused multiply-add of AVX2 and AVX-512 rounds once where portable code rounds
// twice. Included inside an anonymous namespace, so that no two instruction sets share a symbol.

#if defined(__AVX512F__) && defined(__AVX512BW__)

struct Lanes {
    __m512 v;
};
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline void store(float *p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes mul_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Lanes load_f16(const uint16_t *p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }
inline Lanes load_u8(const uint8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}
inline Lanes load_i8(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}
// 16 bytes to their low and high halves, less 8.
inline void load_nibbles(const uint8_t *p, Lanes &low, Lanes &high) {
    // vpermps looks at the low four bits of an index alone, so neither half needs a mask.
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    low = {_mm512_permutexvar_ps(bytes, table)};
    high = {_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table)};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Lanes {
    __m256 a, b;
};
inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, Lanes x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes mul_add(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline __m256 half_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Lanes load_bf16(const uint16_t *p) { return {half_bf16(p), half_bf16(p + 8)}; }
inline Lanes load_f16(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
inline Lanes from_i8(__m128i x) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline Lanes load_u8(const uint8_t *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
inline Lanes load_i8(const int8_t *p) { return from_i8(_mm_loadu_si128((const __m128i *)p)); }
inline void load_nibbles(const uint8_t *p, Lanes &low, Lanes &high) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    low = from_i8(_mm_sub_epi8(_mm_and_si128(bytes, mask), eight));
    high = from_i8(_mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), eight));
}

#else

struct Lanes {
    float v[16];
};
inline Lanes all(float x) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = x;
    return r;
}
inline Lanes zero() { return all(0.0f); }
inline Lanes load(const float *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
}
inline void store(float *p, Lanes a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
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
inline Lanes load_bf16(const uint16_t *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = bf16_to_float(p[i]);
    return r;
}
inline Lanes load_f16(const uint16_t *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = half_to_float(p[i]);
    return r;
}
inline Lanes load_u8(const uint8_t *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
}
inline Lanes load_i8(const int8_t *p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
}
inline void load_nibbles(const uint8_t *p, Lanes &low, Lanes &high) {
    for (int i = 0; i < 16; ++i) {
        low.v[i] = (float)((p[i] & 15) - 8);
        high.v[i] = (float)((p[i] >> 4) - 8);
    }
}

#endif

// All lanes in one, halving: lanes i and i + 8, then + 4, + 2, + 1.
inline float sum(Lanes a) {
    float v[16];
    store(v, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}
