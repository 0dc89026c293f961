// Codes to bit planes and back, one token at a time (../layout.py says where each bit lies). Included inside an
// anonymous namespace.

// ORs `width` bits of every element of one token into codes[dim], `below` bits up.
inline void read_plane(const uint8_t *plane, int64_t dim, int width, int below, uint8_t *codes) {
    const int64_t run = dim * width / 8;
    const uint64_t mask = 0x0101010101010101ull * (uint64_t)((1 << width) - 1);
    for (int i = 0; i < 8 / width; ++i) {
        uint8_t *out = codes + i * run;
        int64_t j = 0;
        for (; j + 8 <= run; j += 8) {  // eight bytes at once; bits that cross bytes fall to the mask
            uint64_t bytes, sum;
            std::memcpy(&bytes, plane + j, 8);
            std::memcpy(&sum, out + j, 8);
            sum |= ((bytes >> (i * width)) & mask) << below;
            std::memcpy(out + j, &sum, 8);
        }
        for (; j < run; ++j) out[j] |= (uint8_t)(((plane[j] >> (i * width)) & (uint8_t)mask) << below);
    }
}

// The inverse: bits below .. below + width of codes[dim] to plane[dim * width / 8].
inline void write_plane(const uint8_t *codes, int64_t dim, int width, int below, uint8_t *plane) {
    const int64_t run = dim * width / 8;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    std::memset(plane, 0, (size_t)run);
    for (int i = 0; i < 8 / width; ++i)
        for (int64_t j = 0; j < run; ++j)
            plane[j] |= (uint8_t)(((codes[i * run + j] >> below) & mask) << (i * width));
}

// The planes of a code of `bits` bits, of `tokens` tokens: calls visit(width, below, offset) for each, where below
// counts the code's bits under the plane and offset is the plane's first byte.
template <typename Visit>
inline void for_planes(int64_t bits, int64_t tokens, int64_t dim, Visit visit) {
    int64_t below = bits, offset = 0;
    for (int width = 8; width; width /= 2) {
        if (!(bits & width)) continue;
        below -= width;
        visit(width, (int)below, offset);
        offset += tokens * dim * width / 8;
    }
}
