// Codes of 4 bits as files of many formats have them, with scales and minimums, to strips: ../affine.py says how, and is the
// reference. Codes change their places, which one build does for every instruction set. Included inside an anonymous
// namespace, after half.h.

// Where the code of an output's input lies; in the order of CodeOrder in ../affine.py.
enum CodeOrder { EACH, PAIRS, HALVES, FAR_HALVES, WORDS_OF_INPUTS, WORDS_OF_OUTPUTS };

struct Affine {
    int64_t out, groups;
    CodeOrder order;
    const uint8_t *codes;
    // Of bytes: from output to output, and from chunk to chunk of chunk_bytes. Of words: from row to row.
    int64_t stride, chunk_stride, chunk_bytes;
    const float *scales, *minimums;  // (out, num_scales); minimums may be null: w = (code - 8) * scale
    int64_t num_scales;
};

constexpr int64_t HALF_GROUP = GROUP / 2;
typedef uint8_t GroupCodes[HALF_GROUP];  // byte j: the codes of inputs j and j + 16

// The codes of 16 outputs, or as many as there are, in one group.
inline void read_output(const Affine &w, int64_t output, int64_t g, GroupCodes to) {
    const int64_t group_bytes = w.order == EACH ? GROUP : HALF_GROUP, each = w.chunk_bytes / group_bytes;
    const uint8_t *chunk = w.codes + output * w.stride + g / each * w.chunk_stride;
    const uint8_t *from = chunk + g % each * group_bytes;
    switch (w.order) {
        case EACH:
            for (int j = 0; j < HALF_GROUP; ++j) to[j] = (uint8_t)((from[j] & 15) | from[j + HALF_GROUP] << 4);
            break;
        case PAIRS:
            for (int j = 0; j < HALF_GROUP; j += 2) {
                const uint8_t near = from[j / 2], far = from[j / 2 + 8];
                to[j] = (uint8_t)((near & 15) | far << 4);
                to[j + 1] = (uint8_t)(near >> 4 | (far & 0xF0));
            }
            break;
        case FAR_HALVES:  // two groups in 32 bytes
            from = chunk + g % each / 2 * GROUP;
            for (int j = 0; j < HALF_GROUP; ++j)
                to[j] = (uint8_t)(g % 2 ? from[j] >> 4 | (from[j + HALF_GROUP] & 0xF0) : (from[j] & 15) | from[j + HALF_GROUP] << 4);
            break;
        default: std::memcpy(to, from, HALF_GROUP);
    }
}
inline void read_words_of_inputs(const Affine &w, int64_t first, int64_t count, int64_t g, GroupCodes *to) {
    const uint8_t *from = w.codes + g * 4 * w.stride + first * 4;
    for (int64_t o = 0; o < count; ++o) {
        uint8_t pairs[HALF_GROUP];
        for (int v = 0; v < 4; ++v) std::memcpy(pairs + 4 * v, from + v * w.stride + 4 * o, 4);
        const Affine one{1, 1, PAIRS, pairs, 0, 0, HALF_GROUP, nullptr, nullptr, 0};
        read_output(one, 0, 0, to[o]);
    }
}
// A word's codes are those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
inline void read_words_of_outputs(const Affine &w, int64_t first, int64_t count, int64_t g, GroupCodes *to) {
    const uint8_t *from = w.codes + g * GROUP * w.stride + first / 2;
    for (int64_t o = 0; o < count; o += 8)
        for (int64_t j = 0; j < HALF_GROUP; ++j) {
            uint32_t near, far;
            std::memcpy(&near, from + j * w.stride + o / 2, 4);
            std::memcpy(&far, from + (j + HALF_GROUP) * w.stride + o / 2, 4);
            const uint32_t even = (near & 0x0F0F0F0F) | (far & 0x0F0F0F0F) << 4, odd = (near >> 4 & 0x0F0F0F0F) | (far & 0xF0F0F0F0);
            constexpr int OF_EVEN[] = {0, 4, 1, 5}, OF_ODD[] = {2, 6, 3, 7};  // by the byte
            for (int b = 0; b < 4; ++b) {
                to[o + OF_EVEN[b]][j] = (uint8_t)(even >> 8 * b);
                to[o + OF_ODD[b]][j] = (uint8_t)(odd >> 8 * b);
            }
        }
}

// A scale and a minimum as halves, scale and offset; true where these say a number that is the same for every code, which is then the
// scale, and codes must be one.
inline bool halves_of(float scale, float minimum, uint16_t *half, uint16_t *offset) {
    *half = half_nearest(scale);
    *offset = half_nearest(-minimum / half_to_float(*half));
    if ((*half & 0x7FFF) && (*offset & 0x7FFF) != 0x7C00) return false;
    *half = half_nearest(minimum);
    *offset = 0;
    return true;
}

// Strips begin .. end; false where float16 cannot hold a number.
inline bool repack_strips(const Affine &w, uint8_t *codes, uint16_t *scales, int64_t begin, int64_t end) {
    // Words of some strips lie in the same lines of memory.
    constexpr int64_t BYTES = STRIP * HALF_GROUP, AT_ONCE = 8;
    const int64_t numbers = w.minimums ? 2 : 1, each = w.num_scales ? w.groups / w.num_scales : 1;
    bool good = true;
    for (int64_t some = begin; some < end; some += AT_ONCE)
        for (int64_t g = 0; g < w.groups; ++g)
            for (int64_t strip = some; strip < end && strip < some + AT_ONCE; ++strip) {
                const int64_t first = strip * STRIP, count = w.out - first < STRIP ? w.out - first : STRIP;
                uint8_t *to = codes + (strip * w.groups + g) * BYTES;
                uint16_t *half = scales + (strip * w.groups + g) * numbers * STRIP;
                GroupCodes read[STRIP] = {};
                if (w.order == WORDS_OF_INPUTS)
                    read_words_of_inputs(w, first, count, g, read);
                else if (w.order == WORDS_OF_OUTPUTS)
                    read_words_of_outputs(w, first, count, g, read);
                else
                    for (int64_t o = 0; o < count; ++o) read_output(w, first + o, g, read[o]);
                if (count < STRIP) std::memset(half, 0, (size_t)(numbers * STRIP * 2));
                for (int64_t o = 0; o < count; ++o) {
                    const int64_t at = (first + o) * w.num_scales + g / each;
                    if (!w.minimums)
                        half[o] = half_nearest(w.scales[at]);
                    else if (halves_of(w.scales[at], w.minimums[at], half + o, half + STRIP + o))
                        std::memset(read[o], 0x11, HALF_GROUP);
                    good = good && (half[o] & 0x7C00) != 0x7C00;
                }
                for (int v = 0; v < 4; ++v)
                    for (int64_t o = 0; o < STRIP; ++o) std::memcpy(to + (v * STRIP + o) * 4, read[o] + 4 * v, 4);
            }
    return good;
}
