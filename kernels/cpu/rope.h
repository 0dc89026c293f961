// What a key's bias adds to scores: the bias is turned by its token's position, so that q.bias is a sum of cosines and sines
// of angles position * frequency. Included inside an anonymous namespace, after lanes.h.

// Cosines and sines, within 4e-7 for angles up to 2**17. A quarter of the angle is at most a quarter of pi, where short
// polynomials do; doubling twice takes no branch.
inline void cos_sin(Lanes x, Lanes *cosine, Lanes *sine) {
    const Lanes magic = all(12582912.0f);  // 1.5 * 2**23: a sum with it is rounded to a whole number
    const Lanes n = sub(add(mul(x, all(0.159154943f)), magic), magic);
    // 2 pi in three parts, the first two so short that n times them is exact.
    Lanes r = mul_add(n, all(-6.28125f), x);
    r = mul_add(n, all(-0.001934051513671875f), r);
    r = mul(mul_add(n, all(-1.2556658930407139e-06f), r), all(0.25f));
    const Lanes square = mul(r, r);
    Lanes s = mul_add(square, all(2.75573192e-6f), all(-1.98412698e-4f));
    s = mul_add(mul_add(s, square, all(8.33333333e-3f)), square, all(-0.166666667f));
    s = mul_add(mul(s, square), r, r);
    Lanes c = mul_add(square, all(2.48015873e-5f), all(-1.38888889e-3f));
    c = mul_add(mul_add(c, square, all(4.16666667e-2f)), square, all(-0.5f));
    c = mul_add(c, square, all(1.0f));
    for (int i = 0; i < 2; ++i) {
        const Lanes twice = add(s, s);
        s = mul(twice, c);
        c = sub(all(1.0f), mul(mul(twice, twice), all(0.5f)));
    }
    *cosine = c;
    *sine = s;
}

// Tokens begin .. end (counted from a.start) of out[rows][count].
void rope_scores(const RopeScores &a, int64_t begin, int64_t end) {
    alignas(64) float cosines[MAX_DIM / 2 * 16], sines[MAX_DIM / 2 * 16];
    for (int64_t t = begin; t < end; t += 16) {
        float at[16];
        for (int i = 0; i < 16; ++i) at[i] = (float)(a.start + t + i);
        const Lanes position = load(at);
        for (int64_t p = 0; p < a.pairs; ++p) {
            Lanes cosine, sine;
            cos_sin(mul(position, all(a.frequencies[p])), &cosine, &sine);
            store(cosines + p * 16, cosine);
            store(sines + p * 16, sine);
        }
        for (int64_t r = 0; r < a.rows; ++r) {
            const float *with_cosine = a.cosines + r * a.pairs, *with_sine = a.sines + r * a.pairs;
            Lanes one = all(a.constant[r]), two = zero();
            for (int64_t p = 0; p < a.pairs; ++p) {
                one = mul_add(all(with_cosine[p]), load(cosines + p * 16), one);
                two = mul_add(all(with_sine[p]), load(sines + p * 16), two);
            }
            float sums[16];
            store(sums, add(one, two));
            const int64_t left = end - t < 16 ? end - t : 16;
            std::memcpy(a.out + r * a.count + t, sums, (size_t)left * 4);
        }
    }
}
