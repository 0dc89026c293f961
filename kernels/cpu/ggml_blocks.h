// Blocks of GGUF files, to strips: ../ggml_blocks.py says how they lie, and is the reference. Codes change their
// places alone, which one build does for every instruction set. Included inside an anonymous namespace, after repack_affine.h.

enum BlockKind { Q8_0, Q4_0, MXFP4, Q4_1, Q4_K, Q5_K, Q6_K, Q5_0, Q5_1, Q2_K, Q3_K, IQ4_NL, IQ4_XS };

struct Blocks {
    BlockKind kind;
    const uint8_t *bytes;  // (out, blocks, bytes of one)
    int64_t out, groups;   // groups of an output
};

inline float half_at(const uint8_t *bytes) {
    uint16_t half;
    std::memcpy(&half, bytes, 2);
    return half_to_float(half);
}

// Four codes of 8 bits, of which -128 becomes -127: 1 more where a byte is 0x80.
inline uint32_t without_least(uint32_t codes) {
    const uint32_t low = 0x7F7F7F7F, other = codes ^ ~low;  // zero where it is
    return codes + (~(((other & low) + low) | other | low) >> 7);
}

// A scale and codes that are a group of ours. Strips begin .. end; false where float16 cannot hold a scale.
template <int HEAD, int WORDS>
bool repack_groups(const Blocks &b, uint8_t *codes, uint16_t *scales, int64_t begin, int64_t end) {
    constexpr int64_t BYTES = HEAD + 4 * WORDS;
    bool good = true;
    for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * STRIP, count = b.out - first < STRIP ? b.out - first : STRIP;
        uint8_t *to = codes + strip * b.groups * STRIP * 4 * WORDS;
        uint16_t *half = scales + strip * b.groups * STRIP;
        for (int64_t g = 0; g < b.groups; ++g, to += STRIP * 4 * WORDS, half += STRIP) {
            if (count < STRIP) std::memset(to, 0, STRIP * 4 * WORDS), std::memset(half, 0, STRIP * 2);
            for (int64_t o = 0; o < count; ++o) {
                const uint8_t *from = b.bytes + ((first + o) * b.groups + g) * BYTES;
                uint32_t words[WORDS];
                std::memcpy(words, from + HEAD, sizeof words);
                for (int v = 0; v < WORDS; ++v) {
                    if (WORDS == GROUP / 4) words[v] = without_least(words[v]);
                    std::memcpy(to + (v * STRIP + o) * 4, words + v, 4);
                }
                if (HEAD == 1)
                    half[o] = half_of_scale(from[0]);
                else
                    std::memcpy(half + o, from, 2);
                good = good && (half[o] & 0x7C00) != 0x7C00;
            }
        }
    }
    return good;
}

// Of the eighth `e` of a block of Q4_K or Q5_K: six bits of scale and of minimum, in twelve bytes.
inline void six_bits(const uint8_t *twelve, int64_t e, float *scale, float *minimum) {
    const uint8_t d = twelve[e & 3], m = twelve[4 + (e & 3)], both = twelve[8 + (e & 3)];
    *scale = (float)(e < 4 ? d & 0x3F : (both & 0x0F) | (d >> 2 & 0x30));
    *minimum = (float)(e < 4 ? m & 0x3F : both >> 4 | (m >> 2 & 0x30));
}

// Scales and minimums of Q4_1 and Q4_K, (out, groups) each, of outputs begin .. end.
inline void read_minimums(const Blocks &b, float *scales, float *minimums, int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
        for (int64_t g = 0; g < b.groups; ++g, ++scales, ++minimums) {
            if (b.kind == Q4_1) {
                const uint8_t *from = b.bytes + (o * b.groups + g) * 20;
                *scales = half_at(from);
                *minimums = half_at(from + 2);
            } else {
                const uint8_t *from = b.bytes + (o * b.groups + g) / 8 * 144;
                six_bits(from + 4, g % 8, scales, minimums);
                *scales *= half_at(from);
                *minimums *= -half_at(from + 2);
            }
        }
}

// Strips begin .. end of a kind up to Q4_K; false where float16 cannot hold a number.
inline bool repack_strips(const Blocks &b, uint8_t *codes, uint16_t *scales, int64_t begin, int64_t end) {
    if (b.kind == Q8_0) return repack_groups<2, GROUP / 4>(b, codes, scales, begin, end);
    if (b.kind == Q4_0) return repack_groups<2, GROUP / 8>(b, codes, scales, begin, end);
    if (b.kind == MXFP4) return repack_groups<1, GROUP / 8>(b, codes, scales, begin, end);
    const bool super = b.kind == Q4_K;
    const int64_t block = super ? 144 : 20, stride = b.groups / (super ? 8 : 1) * block, wide = STRIP * b.groups;
    std::vector<float> numbers((size_t)(2 * wide));
    bool good = true;
    for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * STRIP, count = b.out - first < STRIP ? b.out - first : STRIP;
        read_minimums(b, numbers.data(), numbers.data() + wide, first, first + count);
        const uint8_t *from = b.bytes + first * stride + (super ? 16 : 4);
        const Affine w{count, b.groups, super ? FAR_HALVES : HALVES, from, stride, block, super ? 128 : HALF_GROUP,
                       numbers.data(), numbers.data() + wide, b.groups};
        good = repack_strips(w, codes + strip * wide * HALF_GROUP, scales + strip * wide * 2, 0, 1) && good;
    }
    return good;
}
