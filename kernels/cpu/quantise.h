// Rows of activations, and weights, to groups of 32 that share a scale; every instruction set gives the same bits.
//
// Rows to bytes: in groups of 32 that share a float32 scale = greatest magnitude / 127, the code is
// x * (127 / greatest) rounded to the nearest, ties to even. A group whose
// magnitudes are all below 2**-100 is zero (127 / greatest might overflow). One that is not finite has a scale that is
// not, so that a product with it is not finite either.
//
// Weights to strips: ../quantised.py says how, and is the reference. Included inside an anonymous namespace, after lanes.h, half.h, pages.h, runs.h and
// row_groups.h.

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

// half_above for what is not negative, without a library's help: a weight has a scale for each 32.
inline uint16_t half_from_below(float x) {
    const uint16_t bits = half_nearest(x);
    return (uint16_t)(bits + (half_to_float(bits) < x));
}

// What is rounded to -8 .. 7 then.
inline Lanes to_half_byte(Lanes x) {
    const Lanes at_least = larger(x, all(-8.0f));
    return sub(zero(), larger(sub(zero(), at_least), all(-7.0f)));
}

// A group of each of a strip's outputs, `row_bytes` apart: codes (BITS, STRIP) and scales (STRIP). What is not finite leaves something in
// `nothing`: maxima alone may pass over it.
template <typename From, int BITS>
inline void quantise_groups(const uint8_t *rows, int64_t row_bytes, int32_t *codes, uint16_t *scales, Lanes *nothing) {
    constexpr int SOME = 4;  // outputs at a time
    for (int o = 0; o < STRIP; o += SOME) {
        Lanes a[SOME], b[SOME], most[SOME], least[SOME];
        float greatest[SOME], below[SOME];
        for (int i = 0; i < SOME; ++i) {
            const uint8_t *row = rows + (o + i) * row_bytes;
            a[i] = From::lanes(row);
            b[i] = From::lanes(row + 16 * From::BYTES);
            most[i] = BITS == 8 ? larger(magnitude(a[i]), magnitude(b[i])) : larger(a[i], b[i]);
            if (BITS == 4) least[i] = larger(sub(zero(), a[i]), sub(zero(), b[i]));
            *nothing = add(*nothing, add(sub(a[i], a[i]), sub(b[i], b[i])));
        }
        largest_each<SOME>(most, greatest);
        if (BITS == 4) largest_each<SOME>(least, below);
        for (int i = 0; i < SOME; ++i) {
            if (BITS == 8)
                scales[o + i] = half_from_below(greatest[i] / 127.0f);
            else
                scales[o + i] = half_nearest(((greatest[i] >= below[i] ? greatest[i] : -below[i]) + 0.0f) / -8.0f);
            const float step = half_to_float(scales[o + i]);
            const Lanes by = all(step == 0 ? 1.0f : step);
            int32_t fours[GROUP / 4];
            if (BITS == 8) {
                store_codes(divided(a[i], by), divided(b[i], by), (int8_t *)fours);
            } else {
                int8_t whole[GROUP];  // -8 .. 7
                store_codes(to_half_byte(divided(a[i], by)), to_half_byte(divided(b[i], by)), whole);
                uint64_t low[2], high[2];
                std::memcpy(low, whole, sizeof low);
                std::memcpy(high, whole + GROUP / 2, sizeof high);
                for (int h = 0; h < 2; ++h) {  // eight bytes at a time; eight more is another topmost bit
                    low[h] = (low[h] & 0x0F0F0F0F0F0F0F0F) | (high[h] << 4 & 0xF0F0F0F0F0F0F0F0);
                    low[h] ^= 0x8888888888888888;
                }
                std::memcpy(fours, low, sizeof low);
            }
            for (int v = 0; v < BITS; ++v) codes[v * STRIP + o + i] = fours[v];
        }
    }
}

template <typename From, int BITS>
bool quantise_strips_of(const Unquantised &w, int32_t *codes, uint16_t *scales, int64_t begin, int64_t end) {
    const int64_t groups = num_groups(w.in), row_bytes = w.in * From::BYTES;
    const uint8_t *weight = (const uint8_t *)w.weight;
    Lanes nothing = zero();
    for (int64_t strip = begin; strip < end; ++strip)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t output = strip * STRIP, input = g * GROUP, at = strip * groups + g;
            const uint8_t *rows = weight + output * row_bytes + input * From::BYTES;
            int32_t *to = codes + at * BITS * STRIP;
            if (output + STRIP <= w.out && input + GROUP <= w.in) {
                quantise_groups<From, BITS>(rows, row_bytes, to, scales + at * STRIP, &nothing);
                continue;
            }
            float padded[STRIP][GROUP] = {};
            for (int64_t o = 0; o < STRIP && output + o < w.out; ++o)
                read_raw(w.kind, rows + o * row_bytes, w.in - input < GROUP ? w.in - input : GROUP, padded[o]);
            quantise_groups<FromF32, BITS>((const uint8_t *)padded, sizeof padded[0], to, scales + at * STRIP, &nothing);
        }
    bool good = sum(nothing) == 0;
    for (int64_t i = begin * groups * STRIP; i < end * groups * STRIP; ++i) good = good && (scales[i] & 0x7C00) != 0x7C00;
    return good;
}

// Strips begin .. end; false where something is not finite.
bool quantise_strips(const Unquantised &w, int32_t *codes, uint16_t *scales, int64_t begin, int64_t end) {
    const auto with = [&](auto from) {
        typedef decltype(from) From;
        return w.bits == 8 ? quantise_strips_of<From, 8>(w, codes, scales, begin, end)
                           : quantise_strips_of<From, 4>(w, codes, scales, begin, end);
    };
    return w.kind == RAW_F32 ? with(FromF32()) : w.kind == RAW_F16 ? with(FromF16()) : with(FromBF16());
}
