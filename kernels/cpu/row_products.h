// Products of one row with several weights, shared out among threads, and the numbers that describe a weight. Included by
// bind_step.cpp alone, inside an anonymous namespace.

// A product with its bias; absent where weight is null. The numbers are in the order that ../step.py gives.
struct Product {
    Matrix matrix;
    const float *bias;

    bool is_there() const { return matrix.weight != nullptr; }
};

inline Product read_product(Reader &reader) {
    Product p;
    p.matrix.kind = (WeightKind)reader.number();
    p.matrix.weight = reader.address<const void>();
    p.matrix.scales = reader.address<const uint16_t>();
    p.matrix.first = reader.number();
    p.matrix.in = reader.number();
    p.matrix.out = reader.number();
    p.bias = reader.address<const float>();
    return p;
}

// Memory for what a call works on; grows to the largest layer, and is the calling thread's own.
struct Scratch {
    std::vector<float> normed, entered, first, second, third, heads, experts;
    std::vector<uint8_t> bytes;
    std::vector<std::vector<uint8_t>> more_bytes;  // of several rows at once

    static float *of(std::vector<float> &v, int64_t n) {
        if ((int64_t)v.size() < n) v.resize((size_t)n);
        return v.data();
    }
};
thread_local Scratch scratch;

// One row as products take it; bytes are made where the first product wants them.
class Row {
public:
    explicit Row(const float *x, int64_t in, std::vector<uint8_t> &bytes = scratch.bytes)
        : rows_{1, x, in, nullptr}, in_(in), bytes_(&bytes) {}

    const Rows &for_kind(WeightKind kind) {
        if (takes_bytes(kind) && !rows_.bytes) {
            constexpr size_t LINE = 64;
            const size_t wanted = (size_t)row_bytes(in_) + LINE;
            if (bytes_->size() < wanted) bytes_->resize(wanted);
            const uintptr_t from = reinterpret_cast<uintptr_t>(bytes_->data());
            uint8_t *aligned = at<uint8_t>((from + LINE - 1) / LINE * LINE);
            active->quantise_rows(rows_.x, in_, in_, aligned, 0, 1);
            rows_.bytes = aligned;
        }
        return rows_;
    }

private:
    Rows rows_;
    int64_t in_;
    std::vector<uint8_t> *bytes_;
};

// run(i, begin, end) for parts of several ranges of outputs, the i-th one of 0 .. counts[i], as one range that threads share. Parts
// begin at strips.
template <typename Run>
void share_out_each(const std::vector<int64_t> &counts, int64_t bytes, int threads, const Run &run) {
    int64_t outputs = 0;
    for (const int64_t count : counts) outputs += (count + STRIP - 1) / STRIP * STRIP;
    share_out(outputs, STRIP, bytes, threads, [&](int64_t begin, int64_t end) {
        int64_t start = 0;
        for (size_t i = 0; i < counts.size() && start < end; ++i) {
            const int64_t from = begin > start ? begin - start : 0, to = end - start < counts[i] ? end - start : counts[i];
            if (from < to) run(i, from, to);
            start += (counts[i] + STRIP - 1) / STRIP * STRIP;
        }
    });
}

// Outputs begin .. end of a product, bias included.
inline void multiply_part(const Product &p, const Rows &row, float *out, int64_t begin, int64_t end) {
    active->multiply(p.matrix, row, out, p.matrix.out, begin, end);
    if (p.bias)
        for (int64_t i = begin; i < end; ++i) out[i] += p.bias[i];
}

// Products that take the same row, as one range of outputs that threads share.
struct Target {
    const Product *product;
    float *out;
};

void multiply_each(Row &row, const Target *targets, int count, int threads) {
    int64_t bytes = 0;
    std::vector<int64_t> counts;
    for (int t = 0; t < count; ++t) {
        const Matrix &m = targets[t].product->matrix;
        counts.push_back(m.out);
        bytes += weight_bytes(m);
        row.for_kind(m.kind);
    }
    share_out_each(counts, bytes, threads, [&](size_t t, int64_t begin, int64_t end) {
        const Product &p = *targets[t].product;
        multiply_part(p, row.for_kind(p.matrix.kind), targets[t].out, begin, end);
    });
}

inline void multiply(const Product &product, const float *x, float *out, int threads) {
    Row row(x, product.matrix.in);
    const Target target{&product, out};
    multiply_each(row, &target, 1, threads);
}

// gate = activation(times * gate product) * (up product): each part of the range does both of its own outputs.
void multiply_gate(const Product &g, const Product &u, Row &row, Activation activation, float times, float *gate, float *up,
                   int threads) {
    const Rows &for_gate = row.for_kind(g.matrix.kind), &for_up = row.for_kind(u.matrix.kind);
    share_out(g.matrix.out, STRIP, weight_bytes(g.matrix) + weight_bytes(u.matrix), threads, [&](int64_t begin, int64_t end) {
        multiply_part(g, for_gate, gate, begin, end);
        if (times != 1.0f)
            for (int64_t i = begin; i < end; ++i) gate[i] *= times;
        multiply_part(u, for_up, up, begin, end);
        active->gate_with(activation, gate + begin, up + begin, end - begin);
    });
}

// inner = activation(product), for MLPs without gates; `ones` is worked in.
void multiply_activated(const Product &p, Row &row, Activation activation, float *inner, float *ones, int threads) {
    const Rows &rows = row.for_kind(p.matrix.kind);
    share_out(p.matrix.out, STRIP, weight_bytes(p.matrix), threads, [&](int64_t begin, int64_t end) {
        multiply_part(p, rows, inner, begin, end);
        std::fill(ones + begin, ones + end, 1.0f);
        active->gate_with(activation, inner + begin, ones + begin, end - begin);
    });
}

// Matrices, each in a place of its own, that take the same row, normed where there is a norm: the blocks of an output head, the
// projections of a layer.
class BlockProduct {
public:
    BlockProduct(std::vector<Product> blocks, const Norm &norm) : norm_(norm), blocks_(std::move(blocks)) {
        if (blocks_.empty()) throw std::invalid_argument("a product needs a matrix");
    }

    int64_t num_inputs() const { return blocks_[0].matrix.in; }
    int64_t num_outputs() const {
        int64_t count = 0;
        for (const Product &block : blocks_) count += block.matrix.out;
        return count;
    }

    // Outputs of all blocks side by side.
    void run(const float *x, float *out, int threads) const {
        const int64_t in = num_inputs();
        if (norm_.weight) {
            float *normed = Scratch::of(scratch.normed, in);
            active->norm(norm_, x, in, normed);
            x = normed;
        }
        Row row(x, in);
        std::vector<Target> targets;
        for (const Product &block : blocks_) {
            targets.push_back({&block, out});
            out += block.matrix.out;
        }
        multiply_each(row, targets.data(), (int)targets.size(), threads);
    }

private:
    Norm norm_;
    std::vector<Product> blocks_;
};
