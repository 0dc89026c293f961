// Sixteen float32 lanes in NEON, for lanes.h, which says what each function does. Fused multiply-adds, as in AVX2 and AVX-512.

struct Lanes {
    float32x4_t v[4];
};

// A function of each of the four registers.
#define EBBTIDE_EACH(expression)                                  \
    Lanes r;                                                      \
    EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i) r.v[i] = expression; \
    return r

inline Lanes all(float x) { EBBTIDE_EACH(vdupq_n_f32(x)); }
inline Lanes all_whole(int32_t n) { EBBTIDE_EACH(vcvtq_f32_s32(vdupq_n_s32(n))); }
inline Lanes zero() { return all(0.0f); }
inline Lanes load(const float *p) { EBBTIDE_EACH(vld1q_f32(p + 4 * i)); }
inline void store(float *p, Lanes a) {
    EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline Lanes alternating(const float *p) {
    const float32x4_t both = vcombine_f32(vld1_f32(p), vld1_f32(p));
    EBBTIDE_EACH(both);
}
inline Lanes add(Lanes a, Lanes b) { EBBTIDE_EACH(vaddq_f32(a.v[i], b.v[i])); }
inline Lanes sub(Lanes a, Lanes b) { EBBTIDE_EACH(vsubq_f32(a.v[i], b.v[i])); }
inline Lanes mul(Lanes a, Lanes b) { EBBTIDE_EACH(vmulq_f32(a.v[i], b.v[i])); }
inline Lanes divided(Lanes a, Lanes b) { EBBTIDE_EACH(vdivq_f32(a.v[i], b.v[i])); }
inline Lanes mul_add(Lanes a, Lanes b, Lanes c) { EBBTIDE_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// b where a is not a number, as on the other machines: vmaxq_f32 would give what is not.
inline Lanes larger(Lanes a, Lanes b) { EBBTIDE_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline Lanes magnitude(Lanes a) { EBBTIDE_EACH(vabsq_f32(a.v[i])); }
inline Lanes add_exponent(Lanes a, Lanes n) {
    EBBTIDE_EACH(vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v[i]), vshlq_n_s32(vreinterpretq_s32_f32(n.v[i]), 23))));
}
inline Lanes load_bf16(const void *p) { EBBTIDE_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)p + 4 * i), 16))); }
inline Lanes load_f16(const void *p) {
    EBBTIDE_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p + 4 * i))));
}
inline Lanes from_words(uint16x8_t a, uint16x8_t b) {
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(a))), vcvtq_f32_u32(vmovl_high_u16(a)),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(b))), vcvtq_f32_u32(vmovl_high_u16(b))}};
}
inline Lanes load_u8(const uint8_t *p) {
    const uint8x16_t x = vld1q_u8(p);
    return from_words(vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
}
inline int8x16_t narrowed(const int32x4_t *x) {
    const int16x8_t first = vcombine_s16(vqmovn_s32(x[0]), vqmovn_s32(x[1]));
    const int16x8_t second = vcombine_s16(vqmovn_s32(x[2]), vqmovn_s32(x[3]));
    return vcombine_s8(vqmovn_s16(first), vqmovn_s16(second));
}
// What is not a number gives zero, and what is beyond a byte its end: the group's scale says it.
inline int8x16_t codes_of(Lanes a, int32x4_t *total) {
    int32x4_t whole[4];
    EBBTIDE_UNROLLED for (int i = 0; i < 4; ++i) *total = vaddq_s32(*total, whole[i] = vcvtnq_s32_f32(a.v[i]));
    return narrowed(whole);
}
inline int32_t store_codes(Lanes a, Lanes b, int8_t *to) {
    int32x4_t total = vdupq_n_s32(0);
    vst1q_s8(to, codes_of(a, &total));
    vst1q_s8(to + 16, codes_of(b, &total));
    return vaddvq_s32(total);
}

#undef EBBTIDE_EACH

// Lanes i and i + 8 of a vector; of those i and i + 2 in each run of four, then i and i + 1; then the two runs.
inline float sum_one(Lanes a) {
    const float32x4_t first = vaddq_f32(a.v[0], a.v[2]), second = vaddq_f32(a.v[1], a.v[3]);
    const float32x2_t x = vadd_f32(vget_low_f32(first), vget_high_f32(first)), y = vadd_f32(vget_low_f32(second), vget_high_f32(second));
    const float32x2_t runs = vpadd_f32(x, y);
    return vget_lane_f32(runs, 0) + vget_lane_f32(runs, 1);
}
inline float largest_one(Lanes a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
