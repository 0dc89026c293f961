// MXFP4 weights as files have them, to strips: ../quantised.py says how, and is the reference. Codes change their places
// alone, which one build does for every instruction set.
#pragma once
#include <cstring>

#include "kernels.h"

namespace ebbtide {

struct Mxfp4 {
    int64_t out, groups;
    const uint8_t *blocks;  // (out, groups, 16): two codes a byte, neighbouring inputs', the first one's in the low half
    int64_t blocks_stride;  // bytes from output to output
    const uint8_t *scales;  // (out, groups): e of 2**(e - 127)
    int64_t scales_stride;
};

// float16 of 2**(e - 128), to the nearest; infinite where it has no such number, and where e says that there is none.
inline uint16_t half_of_scale(uint8_t e) {
    if (e < 104) return 0;  // 2**-25 is as near to zero as to the least number
    if (e < 114) return (uint16_t)(1 << (e - 104));
    return (uint16_t)(e > 143 ? 0x7C00 : (e - 113) << 10);
}

// A group of one output, whose bytes become four at a time, STRIP * 4 apart.
inline void repack_group(const uint8_t *from, uint8_t *to) {
    uint16_t both[GROUP / 4];  // two bytes of which the lower is the first
    for (int k = 0; k < GROUP / 4; ++k) {
        const uint16_t near = from[k], far = from[k + 8];  // inputs 2 k and 2 k + 1, and 16 more
        both[k] = (uint16_t)((near & 15) | (near & 0xF0) << 4 | (far & 15) << 4 | (far & 0xF0) << 8);
    }
    for (int v = 0; v < 4; ++v) std::memcpy(to + v * STRIP * 4, both + 2 * v, 4);
}

// Strips begin .. end; false where float16 cannot hold a scale.
inline bool repack_strips(const Mxfp4 &w, uint8_t *codes, uint16_t *scales, int64_t begin, int64_t end) {
    constexpr int64_t BYTES = STRIP * GROUP / 2;
    bool good = true;
    for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = strip * STRIP, count = w.out - first < STRIP ? w.out - first : STRIP;
        uint8_t *to = codes + strip * w.groups * BYTES;
        uint16_t *half = scales + strip * w.groups * STRIP;
        for (int64_t g = 0; g < w.groups; ++g, to += BYTES, half += STRIP) {
            if (count < STRIP) std::memset(to, 0, BYTES), std::memset(half, 0, STRIP * 2);
            for (int64_t o = 0; o < count; ++o) {
                repack_group(w.blocks + (first + o) * w.blocks_stride + g * (GROUP / 2), to + 4 * o);
                half[o] = half_of_scale(w.scales[(first + o) * w.scales_stride + g]);
                good = good && half[o] != 0x7C00;
            }
        }
    }
    return good;
}

}  // namespace ebbtide
