// What stands between the products of a layer: norms and the gate of an MLP, for one row.
// Included inside an anonymous namespace, after lanes.h.

// x / rms(x) * (weight + offset), summed in an order that n alone fixes. out may be x.
void rms_norm(const float *x, const float *weight, float offset, float eps, int64_t n, float *out) {
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
    const float factor = 1.0f / std::sqrt(total / (float)n + eps);
    const Lanes times = all(factor), more = all(offset);
    for (i = 0; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), times), add(load(weight + i), more)));
    for (; i < n; ++i) out[i] = x[i] * factor * (weight[i] + offset);
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

template <Lanes (*ACTIVATION)(Lanes)>
inline void gate_lanes(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(gate + i, mul(ACTIVATION(load(gate + i)), load(up + i)));
    if (i == n) return;
    float rest_of_gate[16] = {}, rest_of_up[16] = {};
    std::memcpy(rest_of_gate, gate + i, (size_t)(n - i) * sizeof(float));
    std::memcpy(rest_of_up, up + i, (size_t)(n - i) * sizeof(float));
    store(rest_of_gate, mul(ACTIVATION(load(rest_of_gate)), load(rest_of_up)));
    std::memcpy(gate + i, rest_of_gate, (size_t)(n - i) * sizeof(float));
}

// gate = activation(gate) * up
void gate_with(Activation activation, float *gate, const float *up, int64_t n) {
    switch (activation) {
        case SILU: return gate_lanes<silu>(gate, up, n);
        case GELU_TANH: return gate_lanes<gelu_tanh>(gate, up, n);
        case GELU:
            for (int64_t i = 0; i < n; ++i) gate[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
    }
}
