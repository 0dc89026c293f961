// float32 to the floats that raw tokens are held in. Included inside an anonymous namespace, after half.h.

uint16_t bf16_nearest(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // ties to even
}

uint16_t f16_nearest(float x) { return x != x ? 0x7e00 : half_nearest(x); }

// A row of keys or values, (heads, dim) float32, to where its heads lie head_bytes apart, in another kind of float.
void store_heads(RawKind kind, const float *from, uint8_t *to, int64_t head_bytes, int64_t heads, int64_t dim) {
    for (int64_t h = 0; h < heads; ++h, from += dim, to += head_bytes) {
        if (kind == RAW_F32)
            std::memcpy(to, from, (size_t)dim * sizeof(float));
        else
            for (int64_t i = 0; i < dim; ++i)
                ((uint16_t *)to)[i] = kind == RAW_BF16 ? bf16_nearest(from[i]) : f16_nearest(from[i]);
    }
}
