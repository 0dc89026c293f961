// float16 and bfloat16 as bits, and rounding to float16, to the nearest or in one direction. Included inside an anonymous namespace.

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7F800000 | fraction << 13);
    if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
    float tiny = (float)fraction * 0x1p-24f;  // denormal or zero, exact
    return bits_to_float(sign | float_to_bits(tiny));
}

// The greatest float16 that is not above x, as bits; -inf (0xFC00) below float16's range. x is not NaN.
inline uint16_t half_below(double x) {
    bool negative = x < 0;
    double size = negative ? -x : x;
    if (size > 65504.0) return negative ? 0xFC00 : 0x7BFF;
    // Truncate the magnitude: float16 steps by 2**(e - 10), and by 2**-24 below 2**-14.
    int exponent = 0;
    std::frexp(size, &exponent);  // size = m * 2**exponent with m in [0.5, 1)
    int step = exponent - 11 < -24 ? -24 : exponent - 11;
    double steps = std::ldexp(size, -step);
    int64_t whole = (int64_t)steps;
    if (negative && (double)whole != steps) ++whole;  // down means away from zero
    // whole < 2**11 counts steps of 2**step; a carry to 2**11 is the next binade's first number.
    uint16_t bits;
    if (whole < 1024)
        bits = (uint16_t)whole;  // zero or denormal: step is -24
    else
        bits = (uint16_t)(((step + 24) << 10) + whole);  // (step + 25) << 10 plus whole - 1024
    return negative && bits ? (uint16_t)(bits | 0x8000) : bits;
}

inline uint16_t half_above(double x) {
    uint16_t bits = half_below(-x);
    return bits ? (uint16_t)(bits ^ 0x8000) : bits;
}

// x rounded to the nearest float16, ties to even, as bits; infinite beyond float16's range. x is not NaN.
inline uint16_t half_nearest(float x) {
    uint32_t bits = float_to_bits(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits < 0x38800000) {  // below 2**-14 float16 steps by 2**-24; a sum with 1.5 * 2**23 is rounded to a whole number
        const float steps = bits_to_float(bits) * 0x1p24f + 12582912.0f;
        return (uint16_t)(sign | (float_to_bits(steps) & 0x7FF));
    }
    bits += 0xFFF + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits < 0x47800000 ? (bits >> 13) - (112 << 10) : 0x7C00));
}
