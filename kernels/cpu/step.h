// What stands between the products of a layer: norms and the gate of an MLP, for one row.
// Included inside an anonymous namespace, after lanes.h.

// `count` numbers, or sixteen where there are more; the other lanes are zero.
inline Lanes load_some(const float *p, int64_t count) {
    if (count >= 16) return load(p);
    float some[16] = {};
    std::memcpy(some, p, (size_t)count * sizeof(float));
    return load(some);
}

inline void store_some(float *p, Lanes a, int64_t count) {
    if (count >= 16) return store(p, a);
    float some[16];
    store(some, a);
    std::memcpy(p, some, (size_t)count * sizeof(float));
}

// The sum of n squares, in an order that n alone fixes.
inline float sum_of_squares(const float *x, int64_t n) {
    Lanes parts[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int c = 0; c < 4; ++c) {
            const Lanes a = load(x + i + 16 * c);
            parts[c] = mul_add(a, a, parts[c]);
        }
    for (; i + 16 <= n; i += 16) parts[0] = mul_add(load(x + i), load(x + i), parts[0]);
    float total = sum(add(add(parts[0], parts[1]), add(parts[2], parts[3])));
    for (; i < n; ++i) total += x[i] * x[i];
    return total;
}

inline float inverse_rms(const float *x, float eps, int64_t n) { return 1.0f / std::sqrt(sum_of_squares(x, n) / (float)n + eps); }

// x * factor * (weight + offset). out may be x.
inline void weigh(const float *x, float factor, const float *weight, float offset, int64_t n, float *out) {
    const Lanes times = all(factor), more = all(offset);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), times), add(load(weight + i), more)));
    for (; i < n; ++i) out[i] = x[i] * factor * (weight[i] + offset);
}

// The sum of n numbers, in an order that n alone fixes.
inline float sum_of(const float *x, int64_t n) {
    Lanes parts[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int c = 0; c < 4; ++c) parts[c] = add(parts[c], load(x + i + 16 * c));
    for (; i + 16 <= n; i += 16) parts[0] = add(parts[0], load(x + i));
    float total = sum(add(add(parts[0], parts[1]), add(parts[2], parts[3])));
    for (; i < n; ++i) total += x[i];
    return total;
}

// See Norm. out may be x.
void norm(const Norm &how, const float *x, int64_t n, float *out) {
    // Twice: the first mean is rounded, and what it leaves is too small to lose much. A row of one number is nothing then.
    for (int times = 0; times < 2 && how.takes_mean; ++times) {
        const float mean = sum_of(x, n) / (float)n;
        for (int64_t i = 0; i < n; ++i) out[i] = x[i] - mean;
        x = out;
    }
    weigh(x, inverse_rms(x, how.eps, n), how.weight, how.offset, n, out);
    for (int64_t i = 0; how.bias && i < n; ++i) out[i] += how.bias[i];
}

inline Lanes at_most_zero(Lanes x) { return sub(zero(), larger(sub(zero(), x), zero())); }

// 1 / (1 + exp(-x)) from exponentials of numbers that are not positive.
inline Lanes sigmoid(Lanes x) {
    const Lanes one = all(1.0f);
    return divided(exp_lanes(at_most_zero(x)), add(one, exp_lanes(sub(zero(), magnitude(x)))));
}

inline Lanes silu(Lanes x) { return mul(x, sigmoid(x)); }

// 1 + tanh(y) = 2 sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x**3)
inline Lanes gelu_tanh(Lanes x) {
    const Lanes cubed = mul(mul(x, x), x);
    return mul(x, sigmoid(mul(all(1.5957691216f), mul_add(all(0.044715f), cubed, x))));
}

// What is above zero, and its square. A NaN stays one: `larger` gives its second argument then.
inline Lanes relu(Lanes x) { return larger(zero(), x); }
inline Lanes relu2(Lanes x) { return mul(relu(x), relu(x)); }

// log(1 + exp(x)). Within 4 ulp. A NaN stays one: `larger` gives its second argument then.
inline Lanes softplus(Lanes x) {
    // log(1 + y) is twice the series of artanh at y / (2 + y), at most a third: the first term left out is below 2e-8 of the sum.
    const Lanes y = exp_lanes(sub(zero(), magnitude(x)));
    const Lanes s = divided(y, add(all(2.0f), y)), square = mul(s, s);
    Lanes series = all(1.0f / 13);
    for (int odd = 11; odd >= 1; odd -= 2) series = mul_add(series, square, all(1.0f / (float)odd));
    return mul_add(add(s, s), series, larger(zero(), x));
}

// out = ACTIVATION(gate) * up. out may be either.
template <Lanes (*ACTIVATION)(Lanes)>
inline void gate_lanes(const float *gate, const float *up, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += 16)
        store_some(out + i, mul(ACTIVATION(load_some(gate + i, n - i)), load_some(up + i, n - i)), n - i);
}

// gate = g sigmoid(1.702 g) (u + 1), where g is the gate, at most 7, and u is up, from -7 to 7. A NaN stays one: `larger` gives its
// second argument then.
inline void clamped_swiglu(float *gate, const float *up, int64_t n) {
    const Lanes least = all(-7.0f), one = all(1.0f), steep = all(1.702f);
    for (int64_t i = 0; i < n; i += 16) {
        const Lanes g = sub(zero(), larger(least, sub(zero(), load_some(gate + i, n - i))));
        const Lanes u = sub(zero(), larger(least, sub(zero(), larger(least, load_some(up + i, n - i)))));
        store_some(gate + i, mul(mul(g, sigmoid(mul(g, steep))), add(u, one)), n - i);
    }
}

// gate = activation(gate) * up, or as said above
void gate_with(Activation activation, float *gate, const float *up, int64_t n) {
    switch (activation) {
        case SILU: return gate_lanes<silu>(gate, up, n, gate);
        case GELU_TANH: return gate_lanes<gelu_tanh>(gate, up, n, gate);
        case SIGMOID: return gate_lanes<sigmoid>(gate, up, n, gate);
        case CLAMPED_SWIGLU: return clamped_swiglu(gate, up, n);
        case RELU2: return gate_lanes<relu2>(gate, up, n, gate);
        case RELU: return gate_lanes<relu>(gate, up, n, gate);
        case SOFTPLUS: return gate_lanes<softplus>(gate, up, n, gate);
        case GELU:
            for (int64_t i = 0; i < n; ++i) gate[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
    }
}
