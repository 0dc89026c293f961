// Codes to bit planes and back, one token at a time (../layout.py says where each bit lies). Included inside an
// anonymous namespace.

// Eight, sixteen or thirty-two bytes, shifted as 64-bit numbers: bits that cross bytes fall to the mask. The compiler turns
// them into whatever registers there are.
typedef uint64_t Bytes8;
typedef uint64_t Bytes16 __attribute__((vector_size(16)));
typedef uint64_t Bytes32 __attribute__((vector_size(32)));

template <int WIDTH>
constexpr uint64_t byte_mask() {
    return 0x0101010101010101ull * ((1u << WIDTH) - 1);
}

// ORs WIDTH bits of the sizeof(Bytes) elements of every run, from byte j of the plane on, into codes.
template <int WIDTH, typename Bytes>
inline void read_runs(const uint8_t *plane, int64_t run, int64_t j, int below, uint8_t *codes) {
    Bytes bytes, sum;
    std::memcpy(&bytes, plane + j, sizeof(Bytes));
    for (int i = 0; i < 8 / WIDTH; ++i) {
        uint8_t *out = codes + i * run + j;
        std::memcpy(&sum, out, sizeof(Bytes));
        sum |= ((bytes >> (i * WIDTH)) & byte_mask<WIDTH>()) << below;
        std::memcpy(out, &sum, sizeof(Bytes));
    }
}

// Runs of eight bytes (head_dim 64, one bit) lie side by side, four to a vector.
template <int WIDTH>
inline void read_short_runs(const uint8_t *plane, int below, uint8_t *codes) {
    uint64_t bytes;
    std::memcpy(&bytes, plane, 8);
    Bytes32 all = {bytes, bytes, bytes, bytes}, shifts = {0, WIDTH, 2 * WIDTH, 3 * WIDTH}, sum;
    for (int i = 0; i < 8 / WIDTH; i += 4, shifts += 4 * WIDTH) {
        std::memcpy(&sum, codes + i * 8, 32);
        sum |= ((all >> shifts) & byte_mask<WIDTH>()) << below;
        std::memcpy(codes + i * 8, &sum, 32);
    }
}

template <int WIDTH>
inline void read_plane(const uint8_t *plane, int64_t dim, int below, uint8_t *codes) {
    const int64_t run = dim * WIDTH / 8;
    if (WIDTH <= 2 && run == 8) return read_short_runs<WIDTH>(plane, below, codes);
    int64_t j = 0;
    for (; j + 32 <= run; j += 32) read_runs<WIDTH, Bytes32>(plane, run, j, below, codes);
    for (; j + 16 <= run; j += 16) read_runs<WIDTH, Bytes16>(plane, run, j, below, codes);
    for (; j + 8 <= run; j += 8) read_runs<WIDTH, Bytes8>(plane, run, j, below, codes);
    for (; j < run; ++j)
        for (int i = 0; i < 8 / WIDTH; ++i)
            codes[i * run + j] |= (uint8_t)(((plane[j] >> (i * WIDTH)) & ((1 << WIDTH) - 1)) << below);
}

// ORs `width` bits of every element of one token into codes[dim], `below` bits up.
inline void read_plane(const uint8_t *plane, int64_t dim, int width, int below, uint8_t *codes) {
    switch (width) {
        case 1: return read_plane<1>(plane, dim, below, codes);
        case 2: return read_plane<2>(plane, dim, below, codes);
        case 4: return read_plane<4>(plane, dim, below, codes);
        default: return read_plane<8>(plane, dim, below, codes);
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
