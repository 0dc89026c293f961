// Which experts a token goes through, and what each counts: ../routing.py. Included by bind_step.cpp alone, inside an anonymous
// namespace, after row_products.h.

struct Routing {
    int64_t count, chosen;
    int64_t groups, chosen_groups, best;  // no groups: nothing limits the choice
    bool by_sigmoid, normalised, bias_of_scores;
    float scaling, least_sum;
    const float *bias, *scale;  // of each expert, or null

    // In the order of ../routing.py.
    Routing(Reader &reader, const std::vector<double> &floats) {
        count = reader.number();
        chosen = reader.number();
        groups = reader.number();
        chosen_groups = reader.number();
        best = reader.number();
        by_sigmoid = reader.number() != 0;
        normalised = reader.number() != 0;
        bias_of_scores = reader.number() != 0;
        bias = reader.address<const float>();
        scale = reader.address<const float>();
        scaling = (float)floats.at(0), least_sum = (float)floats.at(1);
        const bool is_grouped = groups && (count % groups || chosen_groups > groups || best > count / groups);
        if (count < 1 || chosen < 1 || chosen > count || is_grouped)
            throw std::invalid_argument("these experts cannot be chosen from");
    }
};

// The places of the `count` greatest of n numbers, the greatest first and of equals the first. Those of what is no number may be
// any, but none comes twice.
inline void find_greatest(const float *x, int64_t n, int64_t count, int64_t *places) {
    for (int64_t k = 0; k < count; ++k) {
        int64_t greatest = -1;
        for (int64_t i = 0; i < n; ++i)
            if ((greatest < 0 || x[i] > x[greatest]) && std::find(places, places + k, i) == places + k) greatest = i;
        places[k] = greatest;
    }
}

inline void to_softmax(float *x, int64_t n) {
    const float highest = *std::max_element(x, x + n);
    float total = 0.0f;
    for (int64_t i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - highest);
    for (int64_t i = 0; i < n; ++i) x[i] /= total;
}

// Of one row of scores, which are used up: numbers and shares of the chosen experts, the best first.
inline void route(const Routing &r, float *scores, int64_t *numbers, float *shares) {
    thread_local std::vector<float> worths, others;
    thread_local std::vector<int64_t> places;
    const int64_t n = r.count;
    float *worth = Scratch::of(worths, n), *other = Scratch::of(others, n);
    const auto weigh = [&] {
        for (int64_t i = 0; i < n; ++i) worth[i] = r.bias ? scores[i] + r.bias[i] : scores[i];
    };
    if (r.bias_of_scores) weigh();
    if (r.by_sigmoid) {
        std::fill(other, other + n, 1.0f);
        active->gate_with(SIGMOID, scores, other, n);
    } else {
        to_softmax(scores, n);
    }
    if (!r.bias_of_scores) weigh();
    if (r.groups) {
        const int64_t each = n / r.groups;
        places.resize((size_t)(r.best > r.groups ? r.best : r.groups));
        for (int64_t g = 0; g < r.groups; ++g) {
            find_greatest(worth + g * each, each, r.best, places.data());
            other[g] = 0.0f;
            for (int64_t k = 0; k < r.best; ++k) other[g] += worth[g * each + places[(size_t)k]];
        }
        find_greatest(other, r.groups, r.groups, places.data());
        for (int64_t k = r.chosen_groups; k < r.groups; ++k)
            std::fill_n(worth + places[(size_t)k] * each, each, -std::numeric_limits<float>::infinity());
    }
    find_greatest(worth, n, r.chosen, numbers);
    float total = r.by_sigmoid ? r.least_sum : 0.0f;
    for (int64_t k = 0; k < r.chosen; ++k) total += shares[k] = scores[numbers[k]];
    for (int64_t k = 0; k < r.chosen; ++k) {
        if (r.normalised) shares[k] /= total;
        shares[k] *= r.scaling;
        if (r.scale) shares[k] *= r.scale[numbers[k]];
    }
}
