// Rows of activations to bytes: in groups of 32 that share a float32 scale = greatest magnitude / 127, the code is
// x * (127 / greatest) rounded to the nearest, ties to even; every instruction set gives the same bits. A group whose
// magnitudes are all below 2**-100 is zero (127 / greatest might overflow). One that is not finite has a scale that is
// not, so that a product with it is not finite either. Included inside an anonymous namespace, after lanes.h.


// A group of a row.
struct RowGroup {
    int32_t fours[GROUP / 4];  // 32 codes, int8, four at a time
    float scale;
    int32_t less_eight;  // -8 times the sum of the codes
};
static_assert(sizeof(RowGroup) == ROW_GROUP_BYTES, "row_bytes counts on it");

inline const RowGroup *apart(const RowGroup *row, int64_t num_bytes) {
    return (const RowGroup *)((const uint8_t *)row + num_bytes);
}

inline void quantise_group(const float *x, RowGroup *to) {
    const Lanes a = load(x), b = load(x + 16);
    const float greatest = largest(larger(magnitude(a), magnitude(b)));
    // x - x is zero, or not a number: maxima alone may pass over what is not.
    const float nothing = sum(add(sub(a, a), sub(b, b)));
    to->scale = greatest < 0x1p-100f ? nothing : greatest / 127.0f + nothing;
    const Lanes inverse = all(greatest < 0x1p-100f ? 0.0f : 127.0f / greatest);
    to->less_eight = (int32_t)(0u - 8u * (uint32_t)store_codes(mul(a, inverse), mul(b, inverse), (int8_t *)to->fours));
}

void quantise_rows(const float *x, int64_t in, int64_t stride, uint8_t *bytes, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float *from = x + row * stride;
        RowGroup *to = (RowGroup *)(bytes + row * row_bytes(in));
        int64_t j = 0;
        for (; j + GROUP <= in; j += GROUP) quantise_group(from + j, to++);
        if (j < in) {
            float padded[GROUP] = {};
            std::memcpy(padded, from + j, (size_t)(in - j) * sizeof(float));
            quantise_group(padded, to);
        }
    }
}
