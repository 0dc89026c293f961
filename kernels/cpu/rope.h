// What a key's bias adds to scores: the bias is turned by its token's position, so that q.bias is a sum of cosines and sines of
// angles; ../rope_scores.py says how they are had block by block. Included inside an anonymous namespace, after prefill.h.

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

constexpr int64_t TURNED_ROWS = 48;  // whose factors the second cache holds while all blocks pass by

// Where the parts of a table begin.
struct TurnTable {
    const float *frequencies, *fast, *slow, *basis;
    explicit TurnTable(const RopeScores &a) {
        frequencies = a.table;
        fast = frequencies + whole_lanes(2 * a.pairs);
        slow = fast + a.num_fast * 2 * TURN_BLOCK;
        basis = slow + (a.pairs - a.num_fast) * TURN_DEGREES;
    }
};

// Factors of some rows, each pair's cosine and sine side by side, `wide` floats a row; and what turning adds of them: sines, and
// cosines less than zero.
struct TurnedFactors {
    int64_t wide;
    std::vector<float> factors, across;
    explicit TurnedFactors(const RopeScores &a)
        : wide(whole_lanes(2 * a.pairs)), factors((size_t)(TURNED_ROWS * wide)), across((size_t)(TURNED_ROWS * wide)) {}
    void take(const RopeScores &a, int64_t first, int64_t count) {
        for (int64_t r = 0; r < count; ++r)
            for (int64_t p = 0; p < a.pairs; ++p) {
                const int64_t from = (first + r) * a.pairs + p;
                const size_t to = (size_t)(r * wide + 2 * p);
                factors[to] = a.cosines[from];
                factors[to + 1] = across[to] = a.sines[from];
                across[to + 1] = -a.cosines[from];
            }
    }
};

// The sums of ROWS rows from `row` of these on at all positions of a block, TURN_BLOCK for each; cosines and sines are those of its centre.
template <int ROWS>
inline void turn_block(const RopeScores &a, const TurnTable &table, const TurnedFactors &of, int64_t row, const float *constant,
                       const float *cosines, const float *sines, float *to) {
    const int64_t wide = of.wide;
    const float *factors = of.factors.data() + row * wide, *across = of.across.data() + row * wide;
    float here[ROWS * MAX_DIM], degrees[ROWS * TURN_DEGREES];  // factors at the centre, and of the polynomials
    for (int64_t j = 0; j < wide; j += 16) {
        const Lanes cosine = load(cosines + j), sine = load(sines + j);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r)
            store(here + r * wide + j, mul_add(load(factors + r * wide + j), cosine, mul(load(across + r * wide + j), sine)));
    }
    Lanes sums[ROWS];
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) sums[r] = zero();
    const float *slow = table.slow;
    for (int64_t p = a.num_fast; p < a.pairs; ++p, slow += TURN_DEGREES) {
        const Lanes part = load(slow);
        EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) sums[r] = mul_add(alternating(here + r * wide + 2 * p), part, sums[r]);
    }
    EBBTIDE_UNROLLED for (int r = 0; r < ROWS; ++r) {
        store(degrees + r * TURN_DEGREES, sums[r]);
        for (int64_t t = 0; t < TURN_BLOCK; t += 16) store(to + r * TURN_BLOCK + t, all(constant[row + r]));
    }
    for (int64_t t = 0; t < TURN_BLOCK; t += PANEL) {
        add_chains<ROWS, CHAIN_LANES>(here, wide, table.fast + t, TURN_BLOCK, 2 * a.num_fast, true, to + t, TURN_BLOCK);
        add_chains<ROWS, CHAIN_LANES>(degrees, TURN_DEGREES, table.basis + t, TURN_BLOCK, TURN_DEGREES, true, to + t, TURN_BLOCK);
    }
}

// Tokens begin .. end (counted from a.start) of out[rows][count].
void rope_scores(const RopeScores &a, int64_t begin, int64_t end) {
    const TurnTable table(a);
    TurnedFactors factors(a);
    const int64_t wide = factors.wide, first = a.start + begin, last = a.start + end;
    float cosines[MAX_DIM], sines[MAX_DIM], block[CHAIN_ROWS * TURN_BLOCK];
    for (int64_t top = 0; top < a.rows; top += TURNED_ROWS) {
        const int64_t some = a.rows - top < TURNED_ROWS ? a.rows - top : TURNED_ROWS;
        factors.take(a, top, some);
        for (int64_t at = first / TURN_BLOCK * TURN_BLOCK; at < last; at += TURN_BLOCK) {
            const Lanes centre = all((float)(at + TURN_BLOCK / 2));
            for (int64_t j = 0; j < wide; j += 16) {
                Lanes cosine, sine;
                cos_sin(mul(centre, load(table.frequencies + j)), &cosine, &sine);
                store(cosines + j, cosine);
                store(sines + j, sine);
            }
            const int64_t from = at > first ? at : first, to = at + TURN_BLOCK < last ? at + TURN_BLOCK : last;
            by_chain_rows(some, [&](auto rows, int64_t row) {
                constexpr int ROWS = decltype(rows)::VALUE;
                turn_block<ROWS>(a, table, factors, row, a.constant + top, cosines, sines, block);
                for (int r = 0; r < ROWS; ++r)
                    std::memcpy(a.out + (top + row + r) * a.count + from - a.start, block + r * TURN_BLOCK + from - at,
                                (size_t)(to - from) * 4);
            });
        }
    }
}
