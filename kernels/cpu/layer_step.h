// A layer's decode step but for its attention and its state, one row: up to the queries, keys and values, and from what was attended,
// and what the state gave, to the residual. Products are shared out among threads; what stands between them is too little to share.
// Included by bind_step.cpp alone, inside an anonymous namespace, after routed_step.h.

// Of one position, rope_width each.
struct Angles {
    const float *cosines, *sines;
};

// Where a row's keys and values go: those of the first head, and bytes from head to head.
struct RowPlace {
    uint8_t *keys, *values;
    int64_t head_bytes;
};

// Of queries and keys: none, heads one by one, all heads as one, heads by weights of their own, heads behind their rotation.
enum QkNorm { NO_NORM, EACH_HEAD, ALL_HEADS, OWN_OF_HEADS, EACH_TURNED };

// Where the gate of what was attended comes from: nowhere, from the query projection, head by head beside the queries, or from a
// matrix of its own, for each number or for each head.
enum OutputGate { NO_GATE, GATE_BESIDE, GATE_OF_NUMBERS, GATE_OF_HEADS };

class LayerStep {
public:
    // numbers, floats: in ../step.py's order.
    LayerStep(const std::vector<int64_t> &numbers, const std::vector<double> &floats) {
        if (floats.size() != FLOATS + 2 * NORMS) throw std::invalid_argument("these are not a layer's numbers");
        std::copy(floats.begin(), floats.begin() + FLOATS, floats_);
        Reader reader{numbers};
        hidden_ = reader.number();
        head_dim_ = reader.number();
        page_dim_ = (head_dim_ + HEAD_ALIGN - 1) / HEAD_ALIGN * HEAD_ALIGN;
        num_heads_ = reader.number();
        rank_ = reader.number();
        qk_norm_ = (QkNorm)reader.number();
        rope_width_ = reader.number();
        is_interleaved_ = reader.number() != 0;
        activation_ = (Activation)reader.number();
        output_gate_ = (OutputGate)reader.number();
        output_activation_ = (Activation)reader.number();
        is_parallel_ = reader.number() != 0;
        for (int i = 0; i < NORMS; ++i) norms_[i] = read_norm(reader, floats.data() + FLOATS + 2 * i);
        for (Product &product : products_) product = read_product(reader);
        if (reader.next != numbers.size() || (is_parallel_ && !norms_[NORM_BEFORE_ATTENTION].weight))
            throw std::invalid_argument("these are not a layer's numbers");
    }

    int64_t hidden_size() const { return hidden_; }
    int64_t query_size() const { return num_heads_ * page_dim_; }  // as attention takes them
    bool has_keys() const { return products_[K].is_there(); }
    bool has_mlp() const { return products_[DOWN].is_there(); }
    int64_t input_size() const { return products_[INPUT_GATE].matrix.out; }  // of the layer's own inputs; 0: it has none

    // Queries (scaled), keys and values of the residual row x, if it has some, each head with zeros behind it up to page_dim_, and the
    // gate of what is attended, of head_dim_ each, if there is one. Without a product of their own values are the keys before norm and
    // rotation. angles: of its position.
    void project(const float *x, const Angles &angles, double scale, float *q, float *k, float *v, float *gate, int threads) const {
        Row row(normed(NORM_BEFORE_ATTENTION, x), hidden_);
        if (rank_)
            project_latent(row, q, k, v, gate, threads);
        else
            project_heads(row, q, k, v, gate, threads);
        finish_heads(q, num_heads_ * head_dim_, NORM_Q, angles, (float)scale);
        pad_heads(q, num_heads_);
        if (!has_keys()) return;
        const int64_t width = products_[K].matrix.out;
        if (!rank_ && !products_[V].is_there()) std::memcpy(v, k, (size_t)width * sizeof(float));
        for (int64_t i = 0; i < width && norms_[NORM_V].weight; i += head_dim_) norm(NORM_V, v + i, head_dim_, v + i);
        clip(v, width);
        finish_heads(k, width, NORM_K, angles, 1.0f);
        if (rank_) std::memcpy(v, k, (size_t)width * sizeof(float));
        pad_heads(k, width / head_dim_);
        pad_heads(v, width / head_dim_);
    }

    // The same, but keys and values go to each of some places, in floats of a kind.
    void project_into(const float *x, const Angles &angles, double scale, float *q, float *gate, const RowPlace *places,
                      int64_t num_places, RawKind kind, int threads) const {
        const int64_t heads = has_keys() ? products_[K].matrix.out / head_dim_ : 0;
        float *k = Scratch::of(scratch.first, heads * page_dim_), *v = Scratch::of(scratch.second, heads * page_dim_);
        project(x, angles, scale, q, k, v, gate, threads);
        for (const RowPlace *place = places; place < places + num_places; ++place) {
            store_heads(kind, k, place->keys, place->head_bytes, heads, page_dim_);
            if (place->values != place->keys) store_heads(kind, v, place->values, place->head_bytes, heads, page_dim_);
        }
    }

    // Attention's output as its projection takes it, of what was attended and the gate that `project` gave: one of these two, or
    // good until the next call.
    const float *output(float *attended, float *gate, int threads) const {
        if (rank_) {
            if (output_gate_ != NO_GATE) {
                active->gate_with(output_activation_, gate, attended, num_heads_ * head_dim_);
                attended = gate;
            }
            const Matrix &values = products_[HEAD_VALUES].matrix;
            float *out = Scratch::of(scratch.heads, values.out);
            multiply_each_head(values, num_heads_, 1, {attended + head_dim_ - rank_, 0, head_dim_}, {out, 0, values.out / num_heads_}, threads);
            return out;
        }
        for (int64_t head = 1; head < num_heads_ && page_dim_ != head_dim_; ++head)
            std::memmove(attended + head * head_dim_, attended + head * page_dim_, (size_t)head_dim_ * sizeof(float));
        if (output_gate_ == NO_GATE) return attended;
        active->gate_with(output_activation_, gate, attended, num_heads_ * head_dim_);
        return gate;
    }

    // The residual row x plus the output projection of what was attended, or of what the state gave where that is all; and plus
    // that of the state beside attention. To out, which may be x.
    void add_attention(const float *x, const float *attended, float *out, int threads) const {
        add_projected(products_[O], floats_[RESIDUAL], x, attended, out, threads);
    }
    void add_beside(const float *x, const float *given, float *out, int threads) const {
        add_projected(products_[BESIDE], floats_[OF_BESIDE], x, given, out, threads);
    }

    // The residual row x plus the output of the MLP, to out, which may be x. entered: the row that entered the layer, which is what
    // an MLP beside attention reads.
    void add_mlp(const float *x, const float *entered, float *out, int threads) const {
        add_mlp_of(is_parallel_ ? normed(NORM_BEFORE_ATTENTION, entered) : nullptr, x, out, threads);
    }

    // What there is of them, one after the other. experts: null where the layer has none.
    void mix(const float *x, const float *attended, const float *beside, const RoutedStep *experts, float *out, int threads) const {
        const float *learnt = products_[LAUREL_LEFT].is_there() ? laurel(x, threads) : nullptr, *h = nullptr;
        if (is_parallel_) h = norm(NORM_BEFORE_ATTENTION, x, hidden_, Scratch::of(scratch.entered, hidden_));  // out may be x
        if (attended) add_attention(x, attended, out, threads), x = out;
        if (beside) add_beside(x, beside, out, threads), x = out;
        if (learnt) {
            for (int64_t i = 0; i < hidden_; ++i) out[i] = (x[i] + learnt[i] + learnt[hidden_ + i]) * (float)std::sqrt(0.5);
            x = out;
        }
        if (experts)
            add_routed(*experts, h, x, out, threads);
        else if (has_mlp())
            add_mlp_of(h, x, out, threads);
    }

    // The residual row x plus what the layer makes of its own inputs (input_size), where it has some, all times its number; to out,
    // which may be x.
    void end(const float *x, const float *inputs, float *out, int threads) const {
        const float times = (float)floats_[OF_ALL];
        if (input_size()) {
            join(x, of_inputs(x, inputs, threads), 1.0f, out);
            x = out;
        }
        for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] * times;
    }

    // What the layer makes of its own inputs, gated by the row x. Good until the next call.
    const float *of_inputs(const float *x, const float *inputs, int threads) const {
        const Product &gate = products_[INPUT_GATE];
        float *inner = Scratch::of(scratch.first, gate.matrix.out), *added = Scratch::of(scratch.second, hidden_);
        multiply(gate, x, inner, threads);
        active->gate_with(activation_, inner, inputs, gate.matrix.out);
        multiply(products_[INPUT_OUTPUT], inner, added, threads);
        return normed(NORM_AFTER_INPUTS, added);
    }

    // What a key bias (kv_heads, page_dim_) adds to the scores of q: factors (num_heads, rope_width / 2) each, and a constant
    // (num_heads) of what is not turned. Rope.factors in C++, to the bit.
    void bias_factors(const float *q, const float *bias, float amplitude, float *cosines, float *sines, float *constant) const {
        const int64_t pairs = rope_width_ / 2, heads = products_[K].matrix.out / head_dim_, rows = num_heads_ / heads;
        const int64_t next = is_interleaved_ ? 1 : pairs, step = is_interleaved_ ? 2 : 1, rest = page_dim_ - rope_width_;
        for (int64_t row = 0; row < num_heads_; ++row) {
            const float *of = q + row * page_dim_, *b = bias + row / rows * page_dim_;
            for (int64_t i = 0; i < pairs; ++i) {
                const float q1 = of[i * step], q2 = of[i * step + next], b1 = b[i * step], b2 = b[i * step + next];
                *cosines++ = (q1 * b1 + q2 * b2) * amplitude;
                *sines++ = (q2 * b1 - q1 * b2) * amplitude;
            }
        }
        std::fill(constant, constant + num_heads_, 0.0f);
        for (int64_t head = 0; head < heads && rest; ++head) {
            const Matrix m{WEIGHT_F32, rest, 1, bias + head * page_dim_ + rope_width_, nullptr, 0};
            const Rows given{rows, q + head * rows * page_dim_ + rope_width_, page_dim_, nullptr};
            active->multiply(m, given, constant + head * rows, 1, 0, 1);
        }
    }

private:
    // MEAN: ones, where few numbers of the MLP's gate count.
    enum {
        Q, K, V, O, GATE, UP, DOWN, ATTENTION_GATE, BESIDE, INPUT_GATE, INPUT_OUTPUT, LAUREL_LEFT, LAUREL_RIGHT, MEAN,
        FEW_QUERIES, HEAD_KEYS, HEAD_VALUES, PRODUCTS
    };
    enum { CUTOFF, CLIP, RESIDUAL, OF_BESIDE, OF_GATE, OF_MLP, OF_ALL, FLOATS };  // those from RESIDUAL on multiply
    enum {
        NORM_BEFORE_ATTENTION, NORM_Q, NORM_K, NORM_V, NORM_AFTER_ATTENTION, NORM_BEFORE_MLP, NORM_AFTER_MLP,
        NORM_BEFORE_EXPERTS, NORM_AFTER_EXPERTS, NORM_AFTER_DENSE,  // of experts beside an MLP, and of that
        NORM_AFTER_INPUTS, NORM_AFTER_LAUREL, NORM_FEW_QUERIES, NORM_LATENT, NORMS
    };

    // x normed, or x itself where the layer has no norm there. Good until the next call.
    const float *normed(int which, const float *x) const {
        return norms_[which].weight ? norm(which, x, hidden_, Scratch::of(scratch.normed, hidden_)) : x;
    }

    const float *norm(int which, const float *x, int64_t n, float *out) const {
        active->norm(norms_[which], x, n, out);
        return out;
    }

    // Queries, keys, values and gate before norms of heads and rotation, of the normed row.
    void project_heads(Row &row, float *q, float *k, float *v, float *gate, int threads) const {
        const Product &query = products_[Q], &key = products_[K], &value = products_[V], &own_gate = products_[ATTENTION_GATE];
        float *from_query = output_gate_ == GATE_BESIDE ? Scratch::of(scratch.third, query.matrix.out) : q;
        float *from_gate = output_gate_ == GATE_OF_HEADS ? Scratch::of(scratch.third, own_gate.matrix.out) : gate;
        Target targets[4] = {{&query, from_query}, {&key, k}, {&value, v}, {&own_gate, from_gate}};
        const auto is_there = [](const Target &target) { return target.product->is_there(); };
        multiply_each(row, targets, (int)(std::partition(targets, targets + 4, is_there) - targets), threads);
        const int64_t queries = num_heads_ * head_dim_;
        for (int64_t i = 0; i < queries && output_gate_ == GATE_BESIDE; i += head_dim_) {
            std::memcpy(q + i, from_query + 2 * i, (size_t)head_dim_ * sizeof(float));
            std::memcpy(gate + i, from_query + 2 * i + head_dim_, (size_t)head_dim_ * sizeof(float));
        }
        if (output_gate_ == GATE_OF_HEADS) spread_gate(from_gate, gate);
    }

    // The gate of each head to all of its numbers.
    void spread_gate(const float *of_heads, float *gate) const {
        for (int64_t i = 0; i < num_heads_ * head_dim_; ++i) gate[i] = of_heads[i / head_dim_];
    }

    // The same where keys and values are one latent of `rank` numbers, behind those that turn: heads' queries are multiplied with
    // what would make keys of it. v is worked in.
    void project_latent(Row &row, float *q, float *k, float *v, float *gate, int threads) const {
        const Product &query = products_[Q], &few = products_[FEW_QUERIES], &key = products_[K], &own_gate = products_[ATTENTION_GATE];
        const Matrix &keys = products_[HEAD_KEYS].matrix;
        const int64_t turning = head_dim_ - rank_, each = query.matrix.out / num_heads_;
        float *heads = Scratch::of(scratch.heads, query.matrix.out);
        float *of_heads = Scratch::of(scratch.third, own_gate.matrix.out + few.matrix.out), *few_numbers = of_heads + own_gate.matrix.out;
        const Target queries = few.is_there() ? Target{&few, few_numbers} : Target{&query, heads};
        const Target targets[] = {queries, {&key, v}, {&own_gate, of_heads}};
        multiply_each(row, targets, own_gate.is_there() ? 3 : 2, threads);
        if (own_gate.is_there()) spread_gate(of_heads, gate);
        if (few.is_there()) multiply(query, norm(NORM_FEW_QUERIES, few_numbers, few.matrix.out, few_numbers), heads, threads);
        multiply_each_head(keys, num_heads_, 1, {heads, 0, each}, {q + turning, 0, head_dim_}, threads);
        for (int64_t head = 0; head < num_heads_; ++head)
            std::memcpy(q + head * head_dim_, heads + head * each + keys.in, (size_t)turning * sizeof(float));
        std::memcpy(k, v + rank_, (size_t)turning * sizeof(float));
        norm(NORM_LATENT, v, rank_, k + turning);
    }

    // What the MLP gives for h, or, where that is null, for the residual row x, normed. Good until the next call.
    float *mlp(const float *h, const float *x, int threads) const {
        const Product &down = products_[DOWN];
        const int64_t inner = down.matrix.in;
        float *gate = Scratch::of(scratch.first, inner), *up = Scratch::of(scratch.second, inner > hidden_ ? inner : hidden_);
        Row row(h ? h : normed(NORM_BEFORE_MLP, x), hidden_);
        if (products_[MEAN].is_there()) {
            const Target inward[] = {{&products_[GATE], gate}, {&products_[UP], up}};
            multiply_each(row, inward, 2, threads);
            for (int64_t i = 0; i < inner && floats_[OF_GATE] != 1.0; ++i) gate[i] *= (float)floats_[OF_GATE];
            keep_above(gate, inner, threads);
            active->gate_with(activation_, gate, up, inner);
        } else if (products_[GATE].is_there())
            multiply_gate(products_[GATE], products_[UP], row, activation_, (float)floats_[OF_GATE], gate, up, threads);
        else
            multiply_activated(products_[UP], row, activation_, gate, up, threads);
        multiply(down, gate, up, threads);
        return up;
    }

    // What each number of a gate is above its mean and CUTOFF deviations, 0 of one that is below; in its place.
    void keep_above(float *gate, int64_t n, int threads) const {
        const auto mean = [&](const float *x) {
            float total;
            multiply(products_[MEAN], x, &total, threads);
            return total / (float)n;
        };
        float *squares = Scratch::of(scratch.experts, n);
        const float middle = mean(gate);
        for (int64_t i = 0; i < n; ++i) {
            gate[i] -= middle;
            squares[i] = gate[i] * gate[i];
        }
        const float least = std::sqrt(mean(squares)) * (float)floats_[CUTOFF];
        for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] - least < 0.0f ? 0.0f : gate[i] - least;
    }

    // What a layer reads of the residual x, and what a matrix of low rank makes of that, one after the other. Good until the MLP's
    // turn.
    const float *laurel(const float *x, int threads) const {
        const int64_t rank = products_[LAUREL_LEFT].matrix.out;
        float *read = Scratch::of(scratch.third, 2 * hidden_ + rank), *learnt = read + hidden_, *inner = learnt + hidden_;
        std::memcpy(read, normed(NORM_BEFORE_ATTENTION, x), (size_t)hidden_ * sizeof(float));
        multiply(products_[LAUREL_LEFT], read, inner, threads);
        multiply(products_[LAUREL_RIGHT], inner, learnt, threads);
        if (norms_[NORM_AFTER_LAUREL].weight) norm(NORM_AFTER_LAUREL, learnt, hidden_, learnt);
        return read;
    }

    void add_mlp_of(const float *h, const float *x, float *out, int threads) const {
        join(x, normed(NORM_AFTER_MLP, mlp(h, x, threads)), (float)floats_[OF_MLP], out);
    }

    // The same of routed experts, and the MLP beside them where the layer has both.
    void add_routed(const RoutedStep &experts, const float *h, const float *x, float *out, int threads) const {
        float *dense = has_mlp() ? Scratch::of(scratch.third, hidden_) : nullptr;
        if (dense) norm(NORM_AFTER_DENSE, mlp(h, x, threads), hidden_, dense);
        float *given = Scratch::of(scratch.first, hidden_);
        const int before = dense ? NORM_BEFORE_EXPERTS : NORM_BEFORE_MLP;
        experts.run(h ? h : normed(before, x), x, given, threads);
        if (dense) {
            norm(NORM_AFTER_EXPERTS, given, hidden_, given);
            for (int64_t i = 0; i < hidden_; ++i) given[i] += dense[i];
        }
        join(x, normed(NORM_AFTER_MLP, given), (float)floats_[OF_MLP], out);
    }

    void add_projected(const Product &p, double times, const float *x, const float *given, float *out, int threads) const {
        float *added = Scratch::of(scratch.first, hidden_);
        multiply(p, given, added, threads);
        join(x, normed(NORM_AFTER_ATTENTION, added), (float)times, out);
    }

    void join(const float *x, const float *added, float times, float *out) const {
        if (times == 1.0f)
            for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] + added[i];
        else
            for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] + added[i] * times;
    }

    // Queries, keys or values within their bounds, if there are some. A NaN stays one.
    void clip(float *x, int64_t n) const {
        const float most = (float)floats_[CLIP];
        for (int64_t i = 0; i < n && most > 0.0f; ++i) x[i] = x[i] > most ? most : x[i] < -most ? -most : x[i];
    }

    // Heads that lie side by side become page_dim_ long each, with zeros behind what they have.
    void pad_heads(float *x, int64_t heads) const {
        for (int64_t head = heads - 1; head >= 0 && page_dim_ != head_dim_; --head) {
            std::memmove(x + head * page_dim_, x + head * head_dim_, (size_t)head_dim_ * sizeof(float));
            std::fill(x + head * page_dim_ + head_dim_, x + (head + 1) * page_dim_, 0.0f);
        }
    }

    // Norm, bounds, rotation and scale of all heads of queries or keys, in place.
    void finish_heads(float *x, int64_t width, int which, const Angles &angles, float scale) const {
        Norm of_head = norms_[which];
        if (qk_norm_ == ALL_HEADS) norm(which, x, width, x);
        for (float *head = x; head < x + width; head += head_dim_) {
            if (qk_norm_ == EACH_HEAD || qk_norm_ == OWN_OF_HEADS) active->norm(of_head, head, head_dim_, head);
            clip(head, head_dim_);
            turn_head(head, rope_width_, is_interleaved_, angles.cosines, angles.sines);
            if (qk_norm_ == EACH_TURNED) active->norm(of_head, head, head_dim_, head);
            if (qk_norm_ == OWN_OF_HEADS) of_head.weight += head_dim_;
            if (scale != 1.0f)
                for (int64_t i = 0; i < head_dim_; ++i) head[i] *= scale;
        }
    }

    double floats_[FLOATS];
    int64_t hidden_, head_dim_, page_dim_, num_heads_, rank_, rope_width_;  // rank_: of what keys and values are made of, or 0
    QkNorm qk_norm_;
    bool is_interleaved_, is_parallel_;
    Activation activation_, output_activation_;
    OutputGate output_gate_;
    Norm norms_[NORMS];
    Product products_[PRODUCTS];
};
