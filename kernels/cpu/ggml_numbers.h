// The numbers of blocks of GGUF files, as llama.cpp's reference and the gguf package compute them, to the bit. A block's bytes
// come first, then its floats. Included inside an anonymous namespace, after ggml_blocks.h.

// Sixteen steps that lie closer around zero.
constexpr int8_t UNEVEN[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// 32 codes of four bits in sixteen bytes: the low halves, then the high ones.
inline int four_bits(const uint8_t *from, int j) { return from[j % 16] >> (j / 16 * 4) & 15; }

template <bool HAS_MINIMUM>
void decode_five(const uint8_t *from, float *to) {  // Q5_0, Q5_1
    const float scale = half_at(from), least = HAS_MINIMUM ? half_at(from + 2) : 0;
    const uint8_t *high = from + (HAS_MINIMUM ? 4 : 2), *low = high + 4;
    for (int j = 0; j < 32; ++j) {
        const int code = four_bits(low, j) | (high[j / 8] >> j % 8 & 1) << 4;
        to[j] = HAS_MINIMUM ? scale * (float)code + least : scale * (float)(code - 16);
    }
}
inline void decode_q4_1(const uint8_t *from, float *to) {
    const float scale = half_at(from), least = half_at(from + 2);
    for (int j = 0; j < 32; ++j) to[j] = scale * (float)four_bits(from + 4, j) + least;
}
inline void decode_iq4_nl(const uint8_t *from, float *to) {
    const float scale = half_at(from);
    for (int j = 0; j < 32; ++j) to[j] = scale * (float)UNEVEN[four_bits(from + 2, j)];
}
inline void decode_iq4_xs(const uint8_t *from, float *to) {
    const float scale = half_at(from);
    for (int e = 0; e < 8; ++e, to += 32) {
        const int low = from[4 + e / 2] >> e % 2 * 4 & 15, high = from[2 + e / 4] >> e % 4 * 2 & 3;
        const float d = scale * (float)((low | high << 4) - 32);
        for (int j = 0; j < 32; ++j) to[j] = d * (float)UNEVEN[four_bits(from + 8 + 16 * e, j)];
    }
}

// Of 256 codes of two bits in 64 bytes those of 32 j: neighbours in memory, each eighth at another shift.
inline int two_bits(const uint8_t *from, int e, int j) { return from[e / 4 * 32 + j] >> e % 4 * 2 & 3; }

inline void decode_q2_k(const uint8_t *from, float *to) {
    const float scale = half_at(from + 80), least = half_at(from + 82);
    for (int e = 0; e < 8; ++e, to += 32)
        for (int j = 0; j < 32; ++j) {
            const uint8_t both = from[2 * e + j / 16];
            to[j] = scale * (float)(both & 15) * (float)two_bits(from + 16, e, j) - least * (float)(both >> 4);
        }
}
inline void decode_q3_k(const uint8_t *from, float *to) {
    const float scale = half_at(from + 108);
    const uint8_t *twelve = from + 96;
    for (int e = 0; e < 8; ++e, to += 32) {
        float d[2];
        for (int h = 0; h < 2; ++h) {
            const int i = 2 * e + h, low = twelve[i % 8] >> i / 8 * 4 & 15, high = twelve[8 + i % 4] >> i / 4 * 2 & 3;
            d[h] = scale * (float)((low | high << 4) - 32);
        }
        for (int j = 0; j < 32; ++j) {
            const int less_four = from[j] >> e & 1 ? 0 : 4;
            to[j] = d[j / 16] * (float)(two_bits(from + 32, e, j) - less_four);
        }
    }
}
template <bool HAS_FIFTH>
void decode_affine_k(const uint8_t *from, float *to) {  // Q4_K, Q5_K
    const float scale = half_at(from), least = half_at(from + 2);
    const uint8_t *high = from + 16, *low = high + (HAS_FIFTH ? 32 : 0);
    for (int e = 0; e < 8; ++e, to += 32) {
        float d, m;
        six_bits(from + 4, e, &d, &m);
        d *= scale, m *= least;
        for (int j = 0; j < 32; ++j) {
            const int fifth = HAS_FIFTH ? (high[j] >> e & 1) << 4 : 0;
            to[j] = d * (float)((low[e / 2 * 32 + j] >> e % 2 * 4 & 15) | fifth) - m;
        }
    }
}
inline void decode_q6_k(const uint8_t *from, float *to) {
    const float scale = half_at(from + 208);
    for (int e = 0; e < 8; ++e, to += 32) {
        const uint8_t *low = from + e / 4 * 64 + e % 2 * 32, *high = from + 128 + e / 4 * 32;
        const int low_shift = e % 4 / 2 * 4, high_shift = e % 4 * 2;
        const int8_t of_first = (int8_t)from[192 + 2 * e], of_second = (int8_t)from[193 + 2 * e];
        const float d[2] = {scale * (float)of_first, scale * (float)of_second};
        for (int j = 0; j < 32; ++j) {
            const int code = (low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4;
            to[j] = d[j / 16] * (float)(code - 32);
        }
    }
}

struct BlockDecoder {
    int64_t bytes, numbers;  // of a block
    void (*decode)(const uint8_t *from, float *to);
};

// nullptr for a kind that is not decoded.
inline const BlockDecoder *decoder_of(int kind) {
    static const BlockDecoder decoders[] = {
        {},
        {},
        {},
        {20, 32, decode_q4_1},
        {144, 256, decode_affine_k<false>},
        {176, 256, decode_affine_k<true>},
        {210, 256, decode_q6_k},
        {22, 32, decode_five<false>},
        {24, 32, decode_five<true>},
        {84, 256, decode_q2_k},
        {110, 256, decode_q3_k},
        {18, 32, decode_iq4_nl},
        {136, 256, decode_iq4_xs},
    };
    return kind < Q4_1 || kind > IQ4_XS ? nullptr : &decoders[kind];
}
