// Reading and sealing one page of one head; to the bit what ../pages.py does. Included inside an anonymous
// namespace, after lanes.h, half.h and planes.h.

constexpr int64_t MAX_DIM = 1024;  // of head_dim and of page_tokens; module.cpp refuses more

inline uint16_t load16(const uint8_t *p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return bits;
}

// `count` float16 numbers at p, which may be odd, to floats.
inline void load_halves(const uint8_t *p, int64_t count, float *out) {
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) store(out + j, load_f16(p + 2 * j));
    for (; j < count; ++j) out[j] = half_to_float(load16(p + 2 * j));
}

// The first of `count` float16 numbers, zeros behind them.
inline Lanes load_some_f16(const uint8_t *p, int64_t count) {
    if (count >= 16) return load_f16(p);
    uint16_t some[16] = {0};
    std::memcpy(some, p, (size_t)(2 * count));
    return load_f16(some);
}

void read_raw(RawKind kind, const uint8_t *data, int64_t count, float *out) {
    if (kind == RAW_F32) {
        std::memcpy(out, data, (size_t)count * 4);
    } else if (kind == RAW_F16) {
        load_halves(data, count, out);
    } else {
        int64_t j = 0;
        for (; j + 16 <= count; j += 16) store(out + j, load_bf16(data + 2 * j));
        for (; j < count; ++j) out[j] = bf16_to_float(load16(data + 2 * j));
    }
}

// Reads the codes of one token after another. Sources are added in any order; each has its own planes.
struct CodeReader {
    struct Plane {
        const uint8_t *data;
        int64_t row_bytes;
        int width, below;
    };
    Plane planes[6];
    int num_planes = 0;
    int64_t dim;

    explicit CodeReader(int64_t dim) : dim(dim) {}
    // Planes of `bits` bits at data, whose codes stand `above` bits up in the whole code.
    void add(const uint8_t *data, int64_t bits, int64_t tokens, int64_t above) {
        for_planes(bits, tokens, dim, [&](int width, int below, int64_t offset) {
            planes[num_planes++] = {data + offset, dim * width / 8, width, below + (int)above};
        });
    }
    void read(int64_t token, uint8_t *codes) const {
        std::memset(codes, 0, (size_t)dim);
        for (int i = 0; i < num_planes; ++i) {
            const Plane &p = planes[i];
            read_plane(p.data + token * p.row_bytes, dim, p.width, p.below, codes);
        }
    }
};

inline CodeReader key_codes(const Layout &l, const uint8_t *near, const uint8_t *far) {
    CodeReader reader(l.head_dim);
    reader.add(near, l.near_bits, l.page_tokens, l.far_key_bits());
    reader.add(far, l.far_key_bits(), l.page_tokens, 0);
    return reader;
}

inline CodeReader value_codes(const Layout &l, const uint8_t *far) {
    CodeReader reader(l.head_dim);
    reader.add(far + l.value_offset, l.value_bits, l.page_tokens, 0);
    return reader;
}

// lo + code * scale. The product is exact, so that fused and separate give the same bits.
inline void decode_channels(const uint8_t *codes, const float *lo, const float *scale, int64_t dim, float *out) {
    int64_t j = 0;
    for (; j + 16 <= dim; j += 16) store(out + j, mul_add(load_u8(codes + j), load(scale + j), load(lo + j)));
    for (; j < dim; ++j) out[j] = (float)codes[j] * scale[j] + lo[j];
}

inline void decode_token(const uint8_t *codes, float lo, float scale, int64_t dim, float *out) {
    const Lanes lo16 = all(lo), scale16 = all(scale);
    int64_t j = 0;
    for (; j + 16 <= dim; j += 16) store(out + j, mul_add(load_u8(codes + j), scale16, lo16));
    for (; j < dim; ++j) out[j] = (float)codes[j] * scale + lo;
}

void unpack(const Layout &l, const uint8_t *near, const uint8_t *records, float *out_k, int64_t k_stride,
            float *out_v, int64_t v_stride, int64_t begin, int64_t end) {
    const int64_t dim = l.head_dim, tokens = l.page_tokens;
    float lo[MAX_DIM], scale[MAX_DIM];
    uint8_t codes[MAX_DIM];
    for (int64_t index = begin; index < end; ++index) {
        const Block block(l, index);
        const uint8_t *far = records + block.far_at;
        float *k = out_k + block.head * k_stride + block.first_token * dim;
        float *v = out_v + block.head * v_stride + block.first_token * dim;
        if (l.raw_kind != CODES) {
            read_raw((RawKind)l.raw_kind, far, tokens * dim, k);
            read_raw((RawKind)l.raw_kind, far + l.value_offset, tokens * dim, v);
            continue;
        }
        const uint8_t *head = block.near_block(l, near, records);
        load_halves(head + l.key_min_offset, dim, lo);
        load_halves(head + l.key_min_offset + 2 * dim, dim, scale);
        const CodeReader key_reader = key_codes(l, head, far), value_reader = value_codes(l, far);
        const uint8_t *value_lo = far + l.value_min_offset, *value_scale = value_lo + 2 * tokens;
        for (int64_t t = 0; t < tokens; ++t) {
            key_reader.read(t, codes);
            decode_channels(codes, lo, scale, dim, k + t * dim);
        }
        if (l.shares()) {
            std::memcpy(v, k, (size_t)(tokens * dim) * 4);
            continue;
        }
        for (int64_t t = 0; t < tokens; ++t) {
            value_reader.read(t, codes);
            decode_token(codes, half_to_float(load16(value_lo + 2 * t)), half_to_float(load16(value_scale + 2 * t)),
                         dim, v + t * dim);
        }
    }
}

// --- sealing -----------------------------------------------------------------------------------------------------

inline bool all_finite(const float *x, int64_t count) {
    uint32_t bad = 0;
    for (int64_t j = 0; j < count; ++j) bad |= (float_to_bits(x[j]) & 0x7F800000) == 0x7F800000;
    return !bad;
}

// (lo, scale) of numbers between least and greatest, as codec.box finds them. False if float16 cannot hold them.
inline bool box(float least, float greatest, int64_t bits, uint16_t *lo, uint16_t *scale) {
    const double levels = (double)((1 << bits) - 1);
    *lo = half_below((double)least);
    const double from = (double)half_to_float(*lo);
    if (*lo == 0xFC00) return false;
    *scale = half_above(((double)greatest - from) / levels);
    if (*scale != 0x7C00 && from + levels * (double)half_to_float(*scale) < (double)greatest) ++*scale;
    return *scale != 0x7C00;
}

// round((x - lo) / scale), ties to even, clamped. Adding 1.5 * 2**23 rounds to whole numbers, ties to even.
inline uint8_t encode(float x, float lo, float divisor, float greatest_code) {
    constexpr float ROUND = 12582912.0f;
    float code = ((x - lo) / divisor + ROUND) - ROUND;
    code = code < 0.0f ? 0.0f : code;
    return (uint8_t)(int32_t)(code > greatest_code ? greatest_code : code);
}

bool seal(const Layout &l, const float *k, const float *v, uint8_t *near, uint8_t *records, int64_t begin,
          int64_t end) {
    const int64_t dim = l.head_dim, tokens = l.page_tokens, stride = l.kv_heads * dim;
    float least[MAX_DIM], greatest[MAX_DIM], lo[MAX_DIM], scale[MAX_DIM], divisor[MAX_DIM], read_back[MAX_DIM], total[MAX_DIM];
    uint8_t codes[MAX_DIM], near_codes[MAX_DIM];
    const float greatest_key = (float)((1 << l.key_bits) - 1), greatest_value = (float)((1 << l.value_bits) - 1);
    for (int64_t index = begin; index < end; ++index) {
        const Block block(l, index);
        uint8_t *far = records + block.far_at, *head = block.near_block(l, near, records);
        const float *keys = k + block.first_token * stride + block.head * dim;
        const float *values = v + block.first_token * stride + block.head * dim;

        for (int64_t t = 0; t < tokens; ++t) {
            const float *row = keys + t * stride;
            if (!all_finite(row, dim) || !all_finite(values + t * stride, dim)) return false;
            for (int64_t j = 0; j < dim; ++j) {
                least[j] = t && least[j] < row[j] ? least[j] : row[j];
                greatest[j] = t && greatest[j] > row[j] ? greatest[j] : row[j];
            }
        }
        for (int64_t j = 0; j < dim; ++j) {
            uint16_t lo_bits, scale_bits;
            if (!box(least[j], greatest[j], l.key_bits, &lo_bits, &scale_bits)) return false;
            std::memcpy(head + l.key_min_offset + 2 * j, &lo_bits, 2);
            std::memcpy(head + l.key_min_offset + 2 * (dim + j), &scale_bits, 2);
            lo[j] = half_to_float(lo_bits);
            divisor[j] = scale_bits ? half_to_float(scale_bits) : 1.0f;
        }
        const int64_t far_bits = l.far_key_bits();
        const bool has_key_means = l.shares() && l.value_mean_offset;
        if (has_key_means) load_halves(head + l.key_min_offset + 2 * dim, dim, scale);
        std::memset(total, 0, sizeof total);
        for (int64_t t = 0; t < tokens; ++t) {
            const float *row = keys + t * stride;
            for (int64_t j = 0; j < dim; ++j) codes[j] = encode(row[j], lo[j], divisor[j], greatest_key);
            for (int64_t j = 0; j < dim; ++j) near_codes[j] = (uint8_t)(codes[j] >> far_bits);
            for_planes(l.near_bits, tokens, dim, [&](int width, int below, int64_t offset) {
                write_plane(near_codes, dim, width, below, head + offset + t * dim * width / 8);
            });
            for_planes(far_bits, tokens, dim, [&](int width, int below, int64_t offset) {
                write_plane(codes, dim, width, below, far + offset + t * dim * width / 8);
            });
            if (!has_key_means) continue;
            decode_channels(codes, lo, scale, dim, read_back);
            for (int64_t j = 0; j < dim; ++j) total[j] += read_back[j];
        }
        for (int64_t t = 0; t < (l.shares() ? 0 : tokens); ++t) {
            const float *row = values + t * stride;
            float low = row[0], high = row[0];
            for (int64_t j = 1; j < dim; ++j) {
                low = row[j] < low ? row[j] : low;
                high = row[j] > high ? row[j] : high;
            }
            uint16_t lo_bits, scale_bits;
            if (!box(low, high, l.value_bits, &lo_bits, &scale_bits)) return false;
            std::memcpy(far + l.value_min_offset + 2 * t, &lo_bits, 2);
            std::memcpy(far + l.value_min_offset + 2 * (tokens + t), &scale_bits, 2);
            const float from = half_to_float(lo_bits), step = scale_bits ? half_to_float(scale_bits) : 1.0f;
            for (int64_t j = 0; j < dim; ++j) codes[j] = encode(row[j], from, step, greatest_value);
            for_planes(l.value_bits, tokens, dim, [&](int width, int below, int64_t offset) {
                write_plane(codes, dim, width, below, far + l.value_offset + offset + t * dim * width / 8);
            });
            if (!l.value_mean_offset) continue;
            decode_token(codes, from, half_to_float(scale_bits), dim, read_back);
            for (int64_t j = 0; j < dim; ++j) total[j] += read_back[j];
        }
        if (l.value_mean_offset) {
            const float share = (float)(1.0 / (double)tokens);
            for (int64_t j = 0; j < dim; ++j) {
                const uint16_t bits = half_nearest(total[j] * share);
                if ((bits & 0x7FFF) == 0x7C00) return false;
                std::memcpy(head + l.value_mean_offset + 2 * j, &bits, 2);
            }
        }
    }
    return true;
}
