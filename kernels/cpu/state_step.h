// What a layer that keeps a state makes of one row, for its output projection: each kind of state is a class of its own. Included by
// bind_step.cpp alone, inside an anonymous namespace, after row_products.h.

class StateStep {
public:
    virtual ~StateStep() = default;
    virtual int64_t num_outputs() const = 0;

    // Of the residual row x, to out.
    virtual void run(const float *x, const StatePlace &state, float *out, int threads) const = 0;

    // Of a layer whose matrices lie behind its inputs, so many floats behind the start of all layers' states.
    StatePlace place(const float *before, float *after, int64_t offset) const {
        const Convolution &c = convolution();
        const int64_t inputs = (c.width - 1) * c.channels;
        return {before + offset, before + offset + inputs, after + offset, after + offset + inputs};
    }

protected:
    virtual const Convolution &convolution() const = 0;
};

// Norm, projections, and what recur or short_conv of ../recurrence.py make of them.
class RecurrentStep : public StateStep {
public:
    // projections: those of the layer. gate, steps: what makes these of few of the projected numbers that stand in their place, null
    // where they are projected themselves. numbers: ../recurrence.py's for the layer, after: which of all projected numbers stands at
    // each place (an address, or 0 where they stand in order), what each is multiplied by then (an address, or 0), and whether the
    // layer is more than a short convolution. floats: see read_recurrence.
    RecurrentStep(BlockProduct projections, const BlockProduct *gate, const BlockProduct *steps, const std::vector<int64_t> &numbers,
                  const std::vector<double> &floats)
        : projections_(std::move(projections)) {
        if (gate) gate_.push_back(*gate);
        if (steps) steps_.push_back(*steps);
        Reader reader{numbers};
        order_ = reader.address<const int64_t>();
        factors_ = reader.address<const float>();
        has_matrices_ = reader.number() != 0;
        if (has_matrices_)
            recurrence_ = read_recurrence(reader, floats);
        else
            recurrence_.conv = read_convolution(reader);
        const int64_t channels = recurrence_.conv.channels, heads = recurrence_.heads;
        const int64_t gains = recurrence_.is_delta ? heads : 0;
        int64_t wanted = 3 * channels;
        if (has_matrices_) wanted = channels + width(gate_, num_outputs()) + gains + width(steps_, heads * recurrence_.decay_dim());
        if (projections_.num_outputs() != wanted) throw std::invalid_argument("these are not the layer's projections");
    }

    int64_t num_outputs() const override {
        return has_matrices_ ? recurrence_.heads * recurrence_.value_dim : recurrence_.conv.channels;
    }

    void run(const float *x, const StatePlace &state, float *out, int threads) const override {
        const float *projected = project(x, threads);
        if (!has_matrices_) {
            ShortConvolution s{};
            s.conv = recurrence_.conv;
            s.mixed = projected;
            s.out = out;
            return run_rows(s, state, 1, threads);
        }
        Recurrence r = recurrence_;
        const int64_t values = num_outputs();
        if (r.is_delta) {
            r.conv.inputs = projected;
            const float *gate = projected + r.conv.channels;
            r.gains = gate + width(gate_, values);
            r.gate = made_of(gate_, gate, scratch.third, threads);
            r.steps = made_of(steps_, r.gains + r.heads, scratch.heads, threads);
        } else {
            r.gate = projected;
            r.conv.inputs = projected + values;
            r.steps = r.conv.inputs + r.conv.channels;
        }
        r.out = out;
        run_rows(r, state, 1, threads);
    }

protected:
    const Convolution &convolution() const override { return recurrence_.conv; }

private:
    typedef std::vector<BlockProduct> Perhaps;  // one or none

    // How many projected numbers stand where a product wants `count`, or makes them.
    static int64_t width(const Perhaps &product, int64_t count) {
        if (product.empty()) return count;
        if (product[0].num_outputs() != count) throw std::invalid_argument("these are not the layer's projections");
        return product[0].num_inputs();
    }

    static const float *made_of(const Perhaps &product, const float *projected, std::vector<float> &room, int threads) {
        if (product.empty()) return projected;
        float *made = Scratch::of(room, product[0].num_outputs());
        product[0].run(projected, made, threads);
        return made;
    }

    // Good until the next call.
    const float *project(const float *x, int threads) const {
        const int64_t n = projections_.num_outputs();
        float *found = Scratch::of(scratch.first, n);
        projections_.run(x, found, threads);
        if (order_) {
            float *ordered = Scratch::of(scratch.second, n);
            for (int64_t i = 0; i < n; ++i) ordered[i] = found[order_[i]];
            found = ordered;
        }
        if (factors_)
            for (int64_t i = 0; i < n; ++i) found[i] *= factors_[i];
        return found;
    }

    BlockProduct projections_;
    Perhaps gate_, steps_;
    Recurrence recurrence_{};
    bool has_matrices_;
    const int64_t *order_;
    const float *factors_;
};

// Norm, projections, and what silu_conv and scan of ../scan.py make of them, with what lies between the two.
class ScanStep : public StateStep {
public:
    // inputs: convolution inputs and gate, of the residual; few: of what the convolution gives, numbers for steps, keys and queries;
    // steps: of the first of these. numbers: the convolution, the scan, and norms of keys and queries, or two of zeros; floats: of the
    // norms.
    ScanStep(BlockProduct inputs, BlockProduct few, BlockProduct steps, const std::vector<int64_t> &numbers,
             const std::vector<double> &floats)
        : inputs_(std::move(inputs)), few_(std::move(few)), steps_(std::move(steps)) {
        Reader reader{numbers};
        conv_ = read_convolution(reader);
        scan_ = read_scan(reader);
        for (size_t i = 0; i < 2; ++i) {
            const double of_norm[] = {floats.at(2 * i), floats.at(2 * i + 1)};
            norms_[i] = read_norm(reader, of_norm);
        }
        const int64_t channels = scan_.channels;
        if (conv_.channels != channels || inputs_.num_outputs() != 2 * channels || few_.num_inputs() != channels ||
            few_.num_outputs() != steps_.num_inputs() + 2 * scan_.dim || steps_.num_outputs() != channels)
            throw std::invalid_argument("these are not the layer's projections");
    }

    int64_t num_outputs() const override { return scan_.channels; }

    void run(const float *x, const StatePlace &state, float *out, int threads) const override {
        const int64_t channels = scan_.channels, dim = scan_.dim;
        float *projected = Scratch::of(scratch.first, 2 * channels), *mixed = Scratch::of(scratch.second, channels);
        float *few = Scratch::of(scratch.third, few_.num_outputs()), *steps = Scratch::of(scratch.heads, channels);
        inputs_.run(x, projected, threads);
        Convolution c = conv_;
        c.inputs = projected;
        run_rows(c, state, 1, mixed, threads);
        few_.run(mixed, few, threads);
        steps_.run(few, steps, threads);
        float *keys = few + steps_.num_inputs(), *queries = keys + dim;
        if (norms_[0].weight) active->norm(norms_[0], keys, dim, keys);
        if (norms_[1].weight) active->norm(norms_[1], queries, dim, queries);
        Scan s = scan_;
        s.x = mixed;
        s.steps = steps;
        s.keys = keys;
        s.queries = queries;
        s.gate = projected + channels;
        s.out = out;
        run_rows(s, state, 1, threads);
    }

protected:
    const Convolution &convolution() const override { return conv_; }

private:
    BlockProduct inputs_, few_, steps_;
    Convolution conv_{};
    Scan scan_{};
    Norm norms_[2];
};
