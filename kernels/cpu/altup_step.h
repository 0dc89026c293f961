// What a layer does with residual streams beside each other (../altup_step.py), one row: the streams one after the other. Included by
// bind_step.cpp alone, inside an anonymous namespace, after layer_step.h.

class AltUpStep {
public:
    // numbers: ../altup_step.py's order.
    AltUpStep(const std::vector<int64_t> &numbers, double eps) : eps_((float)eps) {
        Reader reader{numbers};
        norm_ = reader.address<const float>();
        scale_ = reader.address<const float>();
        router_ = read_product(reader);
        prediction_ = read_product(reader);
        correction_ = read_product(reader);
        if (prediction_.matrix.out != streams() * streams() || correction_.matrix.out != streams())
            throw std::invalid_argument("these are not streams");
    }

    int64_t streams() const { return router_.matrix.out; }

    // All streams as they are expected behind the layer, to out, which is not x.
    void predict(const float *x, float *out, int threads) const {
        const int64_t n = size(), count = streams();
        const std::vector<float> shares = shares_of(prediction_, x, threads);
        std::memcpy(out, x, (size_t)(count * n) * sizeof(float));
        for (int64_t to = 0; to < count; ++to)
            for (int64_t from = 0; from < count; ++from) {
                const float share = shares[(size_t)(to * count + from)];
                for (int64_t i = 0; i < n; ++i) out[to * n + i] += x[from * n + i] * share;
            }
    }

    // The streams behind a layer that gave `given` for the first of those that were predicted, to out, which is not `predicted`.
    void correct(const float *predicted, const float *given, float *out, int threads) const {
        const int64_t n = size();
        const std::vector<float> shares = shares_of(correction_, given, threads);
        for (int64_t to = 0; to < streams(); ++to) {
            const float share = shares[(size_t)to] + 1.0f;
            for (int64_t i = 0; i < n; ++i) out[to * n + i] = (given[i] - predicted[i]) * share + predicted[to * n + i];
        }
    }

    // All corrected streams x but the first plus what the layer makes of its own inputs, if it has some.
    void end(const LayerStep &step, float *x, const float *inputs, int threads) const {
        if (!step.input_size()) return;
        const int64_t n = size();
        std::vector<float> by(x, x + n);
        for (int64_t i = 0; i < n && scale_; ++i) by[(size_t)i] *= scale_[i];
        const float *added = step.of_inputs(by.data(), inputs, threads);
        for (int64_t to = 1; to < streams(); ++to)
            for (int64_t i = 0; i < n; ++i) x[to * n + i] += added[i];
    }

private:
    int64_t size() const { return router_.matrix.in; }

    // What a product gives of the numbers from -1 to 1, one for each stream, that the row x (size) is routed by.
    std::vector<float> shares_of(const Product &product, const float *x, int threads) const {
        const int64_t n = size(), count = streams();
        float *normed = Scratch::of(scratch.normed, n);
        active->norm({norm_, nullptr, 0.0f, eps_, false}, x, n, normed);
        for (int64_t i = 0; i < n; ++i) normed[i] /= (float)n;
        std::vector<float> routed((size_t)count), shares((size_t)product.matrix.out);
        const std::vector<float> ones((size_t)count, 1.0f);
        multiply(router_, normed, routed.data(), threads);
        for (float &one : routed) one *= 2.0f;
        active->gate_with(SIGMOID, routed.data(), ones.data(), count);
        for (float &one : routed) one = one * 2.0f - 1.0f;
        multiply(product, routed.data(), shares.data(), threads);
        return shares;
    }

    const float *norm_, *scale_;  // scale: of the first stream, before it gates inputs, or null
    float eps_;
    Product router_, prediction_, correction_;
};
