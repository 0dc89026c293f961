// A layer's decode step but for its attention, one row: up to the queries, keys and values, and from what was attended to the
// residual. Products are shared out among threads; what stands between them is too little to share. Included by
// bind_step.cpp alone, inside an anonymous namespace.

constexpr int NORMS = 6;

// Of one position, rope_width each.
struct Angles {
    const float *cosines, *sines;
};

// Where a row's keys and values go: those of the first head, and bytes from head to head.
struct RowPlace {
    uint8_t *keys, *values;
    int64_t head_bytes;
};

enum QkNorm { NO_NORM, EACH_HEAD, ALL_HEADS };

class LayerStep {
public:
    // numbers: ../step.py's order. eps and the rest: as in ModelConfig.
    LayerStep(const std::vector<int64_t> &numbers, double eps, double norm_offset, double residual_multiplier)
        : eps_((float)eps), offset_((float)norm_offset), multiplier_((float)residual_multiplier) {
        Reader reader{numbers};
        hidden_ = reader.number();
        head_dim_ = reader.number();
        qk_norm_ = (QkNorm)reader.number();
        rope_width_ = reader.number();
        is_interleaved_ = reader.number() != 0;
        activation_ = (Activation)reader.number();
        for (const float *&norm : norms_) norm = reader.address<float>();
        for (Product &product : products_) product = reader.product();
        if (reader.next != numbers.size()) throw std::invalid_argument("this is not a layer");
    }

    int64_t hidden_size() const { return hidden_; }
    int64_t query_size() const { return products_[Q].matrix.out; }

    // Queries (scaled), keys and values of the residual row x. angles: of its position.
    void project(const float *x, const Angles &angles, double scale, float *q, float *k, float *v, int threads) const {
        Row row(normed(NORM_BEFORE_ATTENTION, x), hidden_);
        const Target targets[] = {{&products_[Q], q}, {&products_[K], k}, {&products_[V], v}};
        multiply_each(row, targets, 3, threads);
        finish_heads(q, products_[Q].matrix.out, NORM_Q, angles, (float)scale);
        finish_heads(k, products_[K].matrix.out, NORM_K, angles, 1.0f);
    }

    // The same, but keys and values go to each of some places, in floats of a kind.
    void project_into(const float *x, const Angles &angles, double scale, float *q, const RowPlace *places, int64_t num_places,
                      RawKind kind, int threads) const {
        const int64_t width = products_[K].matrix.out, heads = width / head_dim_;
        float *k = Scratch::of(scratch.first, width), *v = Scratch::of(scratch.second, width);
        project(x, angles, scale, q, k, v, threads);
        for (const RowPlace *place = places; place < places + num_places; ++place) {
            store_heads(kind, k, place->keys, place->head_bytes, heads, head_dim_);
            store_heads(kind, v, place->values, place->head_bytes, heads, head_dim_);
        }
    }

    // The residual row x plus the output of attention, to out, which may be x.
    void add_attention(const float *x, const float *attended, float *out, int threads) const {
        const Product &o = products_[O];
        Row row(attended, o.matrix.in);
        float *added = Scratch::of(scratch.first, hidden_);
        const Target target{&o, added};
        multiply_each(row, &target, 1, threads);
        join(x, normed(NORM_AFTER_ATTENTION, added), out);
    }

    // The residual row x plus the output of the MLP, to out, which may be x.
    void add_mlp(const float *x, float *out, int threads) const {
        const Product &down = products_[DOWN];
        const int64_t inner = down.matrix.in;
        float *gate = Scratch::of(scratch.first, inner), *up = Scratch::of(scratch.second, inner > hidden_ ? inner : hidden_);
        Row row(normed(NORM_BEFORE_MLP, x), hidden_);
        multiply_gate(products_[GATE], products_[UP], row, activation_, gate, up, threads);
        Row gated(gate, inner);
        const Target target{&down, up};
        multiply_each(gated, &target, 1, threads);
        join(x, normed(NORM_AFTER_MLP, up), out);
    }

    // Both, one after the other.
    void mix(const float *x, const float *attended, float *out, int threads) const {
        add_attention(x, attended, out, threads);
        add_mlp(out, out, threads);
    }

    // The factors of what a key bias (kv_heads, head_dim) adds to the scores of q, (num_heads, rope_width / 2) each:
    // Rope.factors in C++, to the bit, where all of a head is turned.
    void bias_factors(const float *q, const float *bias, float amplitude, float *cosines, float *sines) const {
        const int64_t pairs = rope_width_ / 2, groups = query_size() / products_[K].matrix.out;
        const int64_t next = is_interleaved_ ? 1 : pairs, step = is_interleaved_ ? 2 : 1;
        for (int64_t head = 0; head * head_dim_ < query_size(); ++head, q += head_dim_) {
            const float *b = bias + head / groups * head_dim_;
            for (int64_t i = 0; i < pairs; ++i) {
                const float q1 = q[i * step], q2 = q[i * step + next], b1 = b[i * step], b2 = b[i * step + next];
                *cosines++ = (q1 * b1 + q2 * b2) * amplitude;
                *sines++ = (q2 * b1 - q1 * b2) * amplitude;
            }
        }
    }

private:
    enum { Q, K, V, O, GATE, UP, DOWN, PRODUCTS };
    enum { NORM_BEFORE_ATTENTION, NORM_Q, NORM_K, NORM_AFTER_ATTENTION, NORM_BEFORE_MLP, NORM_AFTER_MLP };

    // x normed, or x itself where the layer has no norm there. Good until the next call.
    const float *normed(int which, const float *x) const {
        if (!norms_[which]) return x;
        float *out = Scratch::of(scratch.normed, hidden_);
        active->rms_norm(x, norms_[which], offset_, eps_, hidden_, out);
        return out;
    }

    void join(const float *x, const float *added, float *out) const {
        if (multiplier_ == 1.0f)
            for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] + added[i];
        else
            for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] + added[i] * multiplier_;
    }

    // Norm, rotation and scale of all heads of queries or keys, in place.
    void finish_heads(float *x, int64_t width, int which, const Angles &angles, float scale) const {
        if (qk_norm_ == ALL_HEADS) active->rms_norm(x, norms_[which], offset_, eps_, width, x);
        for (float *head = x; head < x + width; head += head_dim_) {
            if (qk_norm_ == EACH_HEAD) active->rms_norm(head, norms_[which], offset_, eps_, head_dim_, head);
            turn_head(head, rope_width_, is_interleaved_, angles.cosines, angles.sines);
            if (scale != 1.0f)
                for (int64_t i = 0; i < head_dim_; ++i) head[i] *= scale;
        }
    }

    float eps_, offset_, multiplier_;
    int64_t hidden_, head_dim_, rope_width_;
    QkNorm qk_norm_;
    bool is_interleaved_;
    Activation activation_;
    const float *norms_[NORMS];
    Product products_[PRODUCTS];
};
