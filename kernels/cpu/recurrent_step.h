// What a layer that keeps a state makes of one row, for its output projection: norm, projections, and what the state gives.
// Included by bind_step.cpp alone, inside an anonymous namespace, after row_products.h.

class RecurrentStep {
public:
    // projections: those of the layer. numbers: ../recurrence.py's for the layer, after: which of all projected numbers stands at
    // each place (an address, or 0 where they stand in order), what each is multiplied by then (an address, or 0), and whether the
    // layer is more than a short convolution. floats: see read_recurrence.
    RecurrentStep(BlockProduct projections, const std::vector<int64_t> &numbers, const std::vector<double> &floats)
        : projections_(std::move(projections)) {
        Reader reader{numbers};
        order_ = reader.address<const int64_t>();
        factors_ = reader.address<const float>();
        has_matrices_ = reader.number() != 0;
        if (has_matrices_)
            recurrence_ = read_recurrence(reader, floats);
        else
            recurrence_.conv = read_convolution(reader);
        const int64_t channels = recurrence_.conv.channels, values = num_outputs(), heads = recurrence_.heads;
        const int64_t of_heads = (recurrence_.is_delta ? heads : 0) + heads * recurrence_.decay_dim();
        const int64_t wanted = !has_matrices_ ? 3 * channels : channels + values + of_heads;
        if (projections_.num_outputs() != wanted) throw std::invalid_argument("these are not the layer's projections");
    }

    int64_t num_outputs() const { return has_matrices_ ? recurrence_.heads * recurrence_.value_dim : recurrence_.conv.channels; }

    // Of the residual row x, to out.
    void run(const float *x, const StatePlace &state, float *out, int threads) const {
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
            r.gate = projected + r.conv.channels;
            r.gains = r.gate + values;
            r.steps = r.gains + r.heads;
        } else {
            r.gate = projected;
            r.conv.inputs = projected + values;
            r.steps = r.conv.inputs + r.conv.channels;
        }
        r.out = out;
        run_rows(r, state, 1, threads);
    }

    // Of a layer whose matrices lie behind its inputs, so many floats behind the start of all layers' states.
    StatePlace place(const float *before, float *after, int64_t offset) const {
        const int64_t inputs = (recurrence_.conv.width - 1) * recurrence_.conv.channels;
        return {before + offset, before + offset + inputs, after + offset, after + offset + inputs};
    }

private:
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
    Recurrence recurrence_{};
    bool has_matrices_;
    const int64_t *order_;
    const float *factors_;
};
