// Routed experts in the place of an MLP, one row: a router's choice, what the chosen ones give, and what the one gives that all rows
// share. Included by bind_step.cpp alone, inside an anonymous namespace, after routing.h.

// A small MLP: gate and up, or both in one, their rows in turn, or up alone where there is no gate; and down.
struct Expert {
    Product inward[2], down;

    // As many products as the reader says first.
    explicit Expert(Reader &reader) : inward{} {
        const int64_t count = reader.number();
        if (count != 2 && count != 3) throw std::invalid_argument("this is not an expert");
        for (int64_t i = 0; i < count - 1; ++i) inward[i] = read_product(reader);
        down = read_product(reader);
        const Matrix &first = inward[0].matrix, &second = inward[1].matrix;
        const bool is_even = !is_gated() || (second.out == first.out && second.in == first.in);
        if (!is_even || (first.out != inner() && (is_gated() || !is_in_turn())))
            throw std::invalid_argument("this is not an expert");
    }

    int64_t inner() const { return down.matrix.in; }
    bool is_gated() const { return inward[1].is_there(); }
    bool is_in_turn() const { return inward[0].matrix.out == 2 * inner(); }
    // Of what it works on: gate, up, both in turn, and what it gives.
    int64_t floats() const { return 4 * inner() + down.matrix.out; }

    // Outputs begin .. end of the first product, and what is made of them, at the start of `space`.
    void go_inward(Row &row, Activation activation, float *space, int64_t begin, int64_t end) const {
        float *gate = space, *up = gate + inner(), *both = up + inner();
        multiply_part(inward[0], row.for_kind(inward[0].matrix.kind), is_in_turn() ? both : gate, begin, end);
        if (is_in_turn()) {
            begin /= 2, end /= 2;
            for (int64_t i = begin; i < end; ++i) {
                gate[i] = both[2 * i];
                up[i] = both[2 * i + 1];
            }
        } else if (is_gated()) {
            multiply_part(inward[1], row.for_kind(inward[1].matrix.kind), up, begin, end);
        } else {
            std::fill(up + begin, up + end, 1.0f);
        }
        active->gate_with(activation, gate + begin, up + begin, end - begin);
    }
};

struct ChosenExpert {
    const Expert *expert;
    float share;
};

// out += share times what the expert gives for the row x, for each in turn. All that are chosen go inward together, and outward, so
// that threads wait for each other twice. The bits are those of one after the other.
void add_experts(const std::vector<ChosenExpert> &chosen, const float *x, Activation activation, float *out, int threads) {
    std::vector<int64_t> inward, outward;
    int64_t floats = 0, bytes_in = 0, bytes_out = 0;
    Row row(x, chosen[0].expert->inward[0].matrix.in);
    for (const ChosenExpert &one : chosen) {
        for (const Product &product : one.expert->inward)
            if (product.is_there()) {
                row.for_kind(product.matrix.kind);
                bytes_in += weight_bytes(product.matrix);
            }
        bytes_out += weight_bytes(one.expert->down.matrix);
        inward.push_back(one.expert->inward[0].matrix.out);
        outward.push_back(one.expert->down.matrix.out);
        floats += one.expert->floats();
    }
    std::vector<float *> spaces;
    float *space = Scratch::of(scratch.experts, floats);
    for (const ChosenExpert &one : chosen) {
        spaces.push_back(space);
        space += one.expert->floats();
    }
    share_out_each(inward, bytes_in, threads, [&](size_t i, int64_t begin, int64_t end) {
        chosen[i].expert->go_inward(row, activation, spaces[i], begin, end);
    });
    std::vector<Row> rows;
    if (scratch.more_bytes.size() < chosen.size()) scratch.more_bytes.resize(chosen.size());
    for (size_t i = 0; i < chosen.size(); ++i) {
        rows.emplace_back(spaces[i], chosen[i].expert->inner(), scratch.more_bytes[i]);
        rows[i].for_kind(chosen[i].expert->down.matrix.kind);
    }
    share_out_each(outward, bytes_out, threads, [&](size_t i, int64_t begin, int64_t end) {
        const Product &down = chosen[i].expert->down;
        multiply_part(down, rows[i].for_kind(down.matrix.kind), spaces[i] + 4 * chosen[i].expert->inner(), begin, end);
    });
    for (size_t i = 0; i < chosen.size(); ++i) {
        const float *given = spaces[i] + 4 * chosen[i].expert->inner(), share = chosen[i].share;
        for (int64_t j = 0; j < outward[i]; ++j) out[j] += given[j] * share;
    }
}

class RoutedStep {
public:
    // numbers: ../routed_step.py's order. floats: of the routing, then what the shared expert's share is multiplied by, and those
    // of the router's norm.
    RoutedStep(const std::vector<int64_t> &numbers, const std::vector<double> &floats) : RoutedStep(Reader{numbers}, floats) {}

    int64_t hidden_size() const { return router_.matrix.in; }

    // What they give for the row x, to out, both of hidden_size. residual: what they are chosen by, normed, where that is not x.
    void run(const float *x, const float *residual, float *out, int threads) const {
        std::vector<float> scores((size_t)routing_.count), shares((size_t)routing_.chosen);
        std::vector<int64_t> numbers((size_t)routing_.chosen);
        const float *by = x;
        if (router_norm_.weight) {
            float *normed = Scratch::of(scratch.second, hidden_size());
            active->norm(router_norm_, residual, hidden_size(), normed);
            by = normed;
        }
        multiply(router_, by, scores.data(), threads);
        route(routing_, scores.data(), numbers.data(), shares.data());
        std::vector<ChosenExpert> chosen, shared;
        for (size_t i = 0; i < numbers.size(); ++i) chosen.push_back({&experts_[(size_t)numbers[i]], shares[i]});
        std::sort(chosen.begin(), chosen.end(), [](const ChosenExpert &a, const ChosenExpert &b) { return a.expert < b.expert; });
        if (!shared_.empty()) {
            float gate = 1.0f;
            if (shared_gate_.is_there()) {
                const float one = 1.0f;
                multiply(shared_gate_, x, &gate, threads);
                active->gate_with(SIGMOID, &gate, &one, 1);
            }
            shared.push_back({&shared_[0], (float)(shared_scaling_ * gate)});
        }
        std::fill(out, out + hidden_size(), 0.0f);
        if (into_latent_.is_there()) {
            const int64_t size = into_latent_.matrix.out;
            std::vector<float> latent((size_t)size), given((size_t)size);
            multiply(into_latent_, x, latent.data(), threads);
            add_chosen(chosen, latent.data(), size, given.data(), threads);
            multiply(out_of_latent_, given.data(), out, threads);
        } else if (weighs_input_) {
            add_chosen(chosen, x, hidden_size(), out, threads);
        } else {  // all go inward together
            chosen.insert(chosen.end(), shared.begin(), shared.end());
            return add_experts(chosen, x, activation_, out, threads);
        }
        if (!shared.empty()) add_experts(shared, x, activation_, out, threads);
    }

private:
    // Of routed experts alone, whose inputs x have `size` numbers.
    void add_chosen(const std::vector<ChosenExpert> &chosen, const float *x, int64_t size, float *out, int threads) const {
        if (!weighs_input_) return add_experts(chosen, x, activation_, out, threads);
        float *weighted = Scratch::of(scratch.second, size);
        for (const ChosenExpert &one : chosen) {
            for (int64_t i = 0; i < size; ++i) weighted[i] = x[i] * one.share;
            add_experts({{one.expert, 1.0f}}, weighted, activation_, out, threads);
        }
    }

    RoutedStep(Reader reader, const std::vector<double> &floats) : routing_(reader, floats), shared_scaling_(floats.at(2)) {
        if (floats.size() != 5) throw std::invalid_argument("these are not the numbers of experts");
        activation_ = (Activation)reader.number();
        weighs_input_ = reader.number() != 0;
        router_norm_ = read_norm(reader, floats.data() + 3);
        router_ = read_product(reader);
        shared_gate_ = read_product(reader);
        into_latent_ = read_product(reader);
        out_of_latent_ = read_product(reader);
        if (reader.number()) shared_.emplace_back(reader);
        experts_.reserve((size_t)routing_.count);
        while (reader.next < reader.numbers.size()) experts_.emplace_back(reader);
        if ((int64_t)experts_.size() != routing_.count || router_.matrix.out != routing_.count)
            throw std::invalid_argument("these are not as many experts as there are");
    }

    Routing routing_;
    double shared_scaling_;
    Norm router_norm_;  // without one experts are chosen by what they are given
    Activation activation_;
    bool weighs_input_;  // shares are of what experts are given, and not of what they give
    Product router_, shared_gate_, into_latent_, out_of_latent_;  // all but the first: if there are some
    std::vector<Expert> shared_, experts_;  // the first: one or none
};
