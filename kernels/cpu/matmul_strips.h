// Outputs of weights in groups of 8 or 4 bits, from products of codes: whole numbers within a group, float32 from group to
// group, in their order. Included inside an anonymous namespace, after matmul_groups.h.

constexpr int ROWS_AT_ONCE = 8;

// The numbers of a group of a strip, and how a product of codes is added to what the groups before came to.
template <int NUMBERS>
struct GroupScales {
    Lanes scale, offset;
    explicit GroupScales(const uint16_t *scales)
        : scale(load_f16(scales)), offset(NUMBERS == 2 ? mul(load_f16(scales + STRIP), all(0.125f)) : zero()) {}

    Lanes add(Lanes whole, const RowGroup *x, Lanes total) const {
        if (NUMBERS == 2) whole = mul_add(offset, all_whole(x->less_eight), whole);  // exact: 11 bits and 12
        return mul_add(whole, mul(scale, all(x->scale)), total);
    }
};

#if defined(__AMX_INT8__)
#include "matmul_amx.h"
constexpr int BLOCK_STEP = AMX_ROWS;
#else
constexpr int BLOCK_STEP = ROWS_AT_ONCE;
#endif

// Some groups of one strip times ROWS rows, on top of to[row], 16 floats each. PASSING: the weights are read once, so that
// they are fetched ahead. Without, 4 bits are read at 0.89 of the ceiling (AVX2: 0.76) in place of 0.95 (0.88), and with 8192
// inputs, whose codes leave the first cache, at 0.8 (0.65). Into all caches: past the second one, Intel's read at half the rate.
template <typename Group, int ROWS, bool PASSING>
inline void strip_rows(const uint8_t *codes, const uint16_t *scales, int64_t groups, const RowGroup *row, int64_t stride,
                       float (*to)[STRIP]) {
    constexpr int64_t AHEAD = 4096;  // bytes of codes
    constexpr int64_t NUMBERS = Group::NUMBERS * STRIP;
    Lanes total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = load(to[r]);
    for (int64_t g = 0; g < groups; ++g, ++row, codes += Group::BYTES, scales += NUMBERS) {
        if (PASSING) {
            for (int64_t i = 0; i < Group::BYTES; i += 64) __builtin_prefetch(codes + AHEAD + i, 0, 3);
            __builtin_prefetch(scales + AHEAD / Group::BYTES * NUMBERS, 0, 3);
        }
        Lanes whole[ROWS];
        Group::template dots<ROWS>(codes, row, stride, whole);
        const GroupScales<Group::NUMBERS> by(scales);
        for (int r = 0; r < ROWS; ++r) total[r] = by.add(whole[r], apart(row, r * stride), total[r]);
    }
    for (int r = 0; r < ROWS; ++r) store(to[r], total[r]);
}

// At most BLOCK_ROWS rows, whose bytes stay in the second cache while all strips pass by; of a strip, so many groups at a
// time that they stay in the first cache for all those rows.
constexpr int64_t BLOCK_ROWS = 128, BLOCK_BYTES = 512 << 10, BLOCK_GROUPS = 32;

// Outputs from .. to of one strip, counted from the start of the first, for a block of rows.
template <typename Group, bool PASSING>
void multiply_strip(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t from, int64_t to) {
    const int64_t groups = num_groups(m.in), each = row_bytes(m.in), strip = from / STRIP;
    const uint8_t *codes = (const uint8_t *)m.weight + strip * groups * Group::BYTES;
    const uint16_t *scales = m.scales + strip * groups * Group::NUMBERS * STRIP;
    float parts[BLOCK_ROWS][STRIP];
    std::memset(parts, 0, (size_t)rows.count * sizeof parts[0]);
    const int64_t step = PASSING ? groups : BLOCK_GROUPS;
    for (int64_t g = 0; g < groups; g += step, codes += step * Group::BYTES, scales += step * Group::NUMBERS * STRIP) {
        const int64_t count = groups - g < step ? groups - g : step;
        const auto row_of = [&](int64_t r) { return (const RowGroup *)(rows.bytes + r * each) + g; };
        int64_t r = 0;
#if defined(__AMX_INT8__)
        if (!PASSING) {
            alignas(64) uint8_t room[BLOCK_GROUPS * AMX_BYTES];
            const uint8_t *bytes = signed_bytes(Group(), codes, count, room);
            for (; r + AMX_ROWS <= rows.count; r += AMX_ROWS)
                tile_rows<Group>(bytes, scales, count, row_of(r), each, parts + r);
        }
#endif
        for (int64_t done; r < rows.count; r += done) {
            const RowGroup *row = row_of(r);
            const int64_t left = rows.count - r;
            done = left >= ROWS_AT_ONCE ? ROWS_AT_ONCE : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            switch (done) {
                case 1: strip_rows<Group, 1, PASSING>(codes, scales, count, row, each, parts + r); break;
                case 2: strip_rows<Group, 2, PASSING>(codes, scales, count, row, each, parts + r); break;
                case 4: strip_rows<Group, 4, PASSING>(codes, scales, count, row, each, parts + r); break;
                default: strip_rows<Group, ROWS_AT_ONCE, PASSING>(codes, scales, count, row, each, parts + r);
            }
        }
    }
    for (int64_t r = 0; r < rows.count; ++r)
        std::memcpy(out + r * stride + from - m.first, parts[r] + from % STRIP, (size_t)(to - from) * sizeof(float));
}

template <typename Group>
void multiply_strips(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    const int64_t each = row_bytes(m.in), last = end + m.first;
    int64_t block = BLOCK_BYTES / each / BLOCK_STEP * BLOCK_STEP;
    block = block < BLOCK_STEP ? BLOCK_STEP : block > BLOCK_ROWS ? BLOCK_ROWS : block;
#if defined(__AMX_INT8__)
    const TileShapes shapes(PRODUCT_TILES);
#endif
    for (int64_t top = 0; top < rows.count; top += block) {
        const int64_t left = rows.count - top;
        const Rows some{left < block ? left : block, rows.x, rows.stride, rows.bytes + top * each};
        for (int64_t from = begin + m.first, to; from < last; from = to) {
            to = (from / STRIP + 1) * STRIP;
            if (to > last) to = last;
            if (rows.count <= ROWS_AT_ONCE)
                multiply_strip<Group, true>(m, some, out, stride, from, to);
            else
                multiply_strip<Group, false>(m, some, out + top * stride, stride, from, to);
        }
    }
}
