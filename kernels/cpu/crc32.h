// CRC-32 as zlib computes it (reflected, polynomial 0x04C11DB7): what a record has from the moment it is written.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(EBBTIDE_X86)
#include <immintrin.h>
#endif

namespace ebbtide {

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b does to the remainder when k more bytes follow it.
inline CrcTables make_crc_tables() {
    CrcTables tables;
    for (uint32_t b = 0; b < 256; ++b) {
        uint32_t x = b;
        for (int bit = 0; bit < 8; ++bit) x = x >> 1 ^ (x & 1 ? 0xEDB88320u : 0);
        tables[0][b] = x;
    }
    for (int k = 1; k < 8; ++k)
        for (int b = 0; b < 256; ++b)
            tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 255];
    return tables;
}

// The remainder after more bytes; eight at a time where bytes lie little end first.
inline uint32_t crc32_tables(uint32_t state, const uint8_t *p, size_t num_bytes) {
    static const CrcTables t = make_crc_tables();
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; num_bytes >= 8; p += 8, num_bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, p, 8);
        word ^= state;
        state = 0;
        for (int k = 0; k < 8; ++k) state ^= t[7 - k][word >> 8 * k & 255];
    }
#endif
    for (; num_bytes; ++p, --num_bytes) state = state >> 8 ^ t[0][(state ^ *p) & 255];
    return state;
}

#if defined(EBBTIDE_X86)
// The same by carry-less products: blocks of 128 bits are moved to where later ones lie and added to them. Constants are
// powers of x modulo the polynomial, bits reversed: 4 * 128 +- 32 and 128 +- 32 bits further, then 64, then Barrett's.
// (Gopal et al., Fast CRC computation for generic polynomials using PCLMULQDQ, 2009.) num_bytes: 64 or more, whole 16s.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t crc32_products(uint32_t state, const uint8_t *p,
                                                                       size_t num_bytes) {
    const __m128i by_four = _mm_set_epi64x(0x1C6E41596, 0x154442BD4);
    const __m128i by_one = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0);
    const __m128i low_half = _mm_setr_epi32(-1, 0, -1, 0);
    auto at = [](const uint8_t *from) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_loadu_si128((const __m128i *)from);
    };
    auto fold = [](__m128i x, __m128i by, __m128i onto) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), onto);
    };
    __m128i a = _mm_xor_si128(at(p), _mm_cvtsi32_si128((int)state)), b = at(p + 16), c = at(p + 32), d = at(p + 48);
    for (p += 64, num_bytes -= 64; num_bytes >= 64; p += 64, num_bytes -= 64) {
        a = fold(a, by_four, at(p));
        b = fold(b, by_four, at(p + 16));
        c = fold(c, by_four, at(p + 32));
        d = fold(d, by_four, at(p + 48));
    }
    a = fold(fold(fold(a, by_one, b), by_one, c), by_one, d);
    for (; num_bytes >= 16; p += 16, num_bytes -= 16) a = fold(a, by_one, at(p));
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_one, 0x10));
    const __m128i by_64 = _mm_set_epi64x(0, 0x163CD6124);
    a = _mm_xor_si128(_mm_srli_si128(a, 4), _mm_clmulepi64_si128(_mm_and_si128(a, low_half), by_64, 0x00));
    const __m128i barrett = _mm_set_epi64x(0x1F7011641, 0x1DB710641);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(a, low_half), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_half), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(a, quotient), 1);
}
#endif

inline uint32_t crc32(const uint8_t *p, size_t num_bytes) {
    uint32_t state = 0xFFFFFFFFu;
#if defined(EBBTIDE_X86)
    static const bool has_products = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (const size_t whole = num_bytes / 16 * 16; has_products && whole >= 64) {
        state = crc32_products(state, p, whole);
        p += whole;
        num_bytes -= whole;
    }
#endif
    return ~crc32_tables(state, p, num_bytes);
}

}  // namespace ebbtide
