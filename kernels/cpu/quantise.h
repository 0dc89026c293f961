// Rows of activations to bytes: in groups of 32 that share a float32 scale = greatest magnitude / 127, the code is
// x * (127 / greatest) rounded to the nearest, ties to even; every instruction set gives the same bits. A group whose
// magnitudes are all below 2**-100 is zero (127 / greatest might overflow). One that is not finite has a scale that is
// not, so that a product with it is not finite either. Included inside an anonymous namespace, after lanes.h.

inline void quantise_group(const float *x, int8_t *codes, float *scale, int32_t *code_sum) {
    const Lanes a = load(x), b = load(x + 16);
    const float greatest = largest(larger(magnitude(a), magnitude(b)));
    // x - x is zero, or not a number: maxima alone may pass over what is not.
    const float nothing = sum(add(sub(a, a), sub(b, b)));
    *scale = greatest < 0x1p-100f ? nothing : greatest / 127.0f + nothing;
    const Lanes inverse = all(greatest < 0x1p-100f ? 0.0f : 127.0f / greatest);
    *code_sum = store_codes(mul(a, inverse), mul(b, inverse), codes);
}

void quantise_rows(const float *x, int64_t in, int64_t stride, uint8_t *bytes, int64_t begin, int64_t end) {
    const int64_t groups = num_groups(in);
    for (int64_t row = begin; row < end; ++row) {
        const float *from = x + row * stride;
        uint8_t *to = bytes + row * row_bytes(in);
        float *scales = (float *)(to + groups * GROUP);
        int32_t *sums = (int32_t *)(scales + groups);
        for (int64_t g = 0; g < groups; ++g) {
            float padded[GROUP] = {};
            const float *group = from + g * GROUP;
            if ((g + 1) * GROUP > in) {
                std::memcpy(padded, group, (size_t)(in - g * GROUP) * sizeof(float));
                group = padded;
            }
            quantise_group(group, (int8_t *)to + g * GROUP, scales + g, sums + g);
        }
    }
}
