// Products of one row with several weights, shared out among threads, and the numbers that describe a weight. Included by
// bind_step.cpp alone, inside an anonymous namespace.

// A product with its bias; absent where weight is null. The numbers are in the order that ../step.py gives.
struct Product {
    Matrix matrix;
    const float *bias;

    bool is_there() const { return matrix.weight != nullptr; }
};

struct Reader {
    const std::vector<int64_t> &numbers;
    size_t next = 0;

    int64_t number() {
        if (next >= numbers.size()) throw std::invalid_argument("this is not a layer");
        return numbers[next++];
    }
    template <typename T>
    const T *address() {
        return at<const T>((uintptr_t)number());
    }
    Product product() {
        Product p;
        p.matrix.kind = (WeightKind)number();
        p.matrix.weight = address<void>();
        p.matrix.scales = address<uint16_t>();
        p.matrix.first = number();
        p.matrix.in = number();
        p.matrix.out = number();
        p.bias = address<float>();
        return p;
    }
};

// Memory for what a call works on; grows to the largest layer, and is the calling thread's own.
struct Scratch {
    std::vector<float> normed, first, second;
    std::vector<uint8_t> bytes;

    static float *of(std::vector<float> &v, int64_t n) {
        if ((int64_t)v.size() < n) v.resize((size_t)n);
        return v.data();
    }
};
thread_local Scratch scratch;

// One row as products take it; bytes are made where the first product wants them.
class Row {
public:
    explicit Row(const float *x, int64_t in) : rows_{1, x, in, nullptr}, in_(in) {}

    const Rows &for_kind(WeightKind kind) {
        if (takes_bytes(kind) && !rows_.bytes) {
            constexpr size_t LINE = 64;
            const size_t wanted = (size_t)row_bytes(in_) + LINE;
            if (scratch.bytes.size() < wanted) scratch.bytes.resize(wanted);
            const uintptr_t from = reinterpret_cast<uintptr_t>(scratch.bytes.data());
            uint8_t *aligned = at<uint8_t>((from + LINE - 1) / LINE * LINE);
            active->quantise_rows(rows_.x, in_, in_, aligned, 0, 1);
            rows_.bytes = aligned;
        }
        return rows_;
    }

private:
    Rows rows_;
    int64_t in_;
};

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
    int64_t outputs = 0, bytes = 0;
    for (int t = 0; t < count; ++t) {
        const Matrix &m = targets[t].product->matrix;
        outputs += (m.out + STRIP - 1) / STRIP * STRIP;  // so that parts begin at strips
        bytes += weight_bytes(m);
        row.for_kind(m.kind);
    }
    share_out(outputs, STRIP, bytes, threads, [&](int64_t begin, int64_t end) {
        int64_t start = 0;
        for (int t = 0; t < count; ++t) {
            const Product &p = *targets[t].product;
            const int64_t stop = start + (p.matrix.out + STRIP - 1) / STRIP * STRIP;
            const int64_t from = begin > start ? begin - start : 0;
            const int64_t to = (end < stop ? end - start : p.matrix.out) < p.matrix.out ? end - start : p.matrix.out;
            if (from < to) multiply_part(p, row.for_kind(p.matrix.kind), targets[t].out, from, to);
            start = stop;
        }
    });
}

// gate = activation(gate product) * (up product): each part of the range does both of its own outputs.
void multiply_gate(const Product &g, const Product &u, Row &row, Activation activation, float *gate, float *up, int threads) {
    const Rows &for_gate = row.for_kind(g.matrix.kind), &for_up = row.for_kind(u.matrix.kind);
    share_out(g.matrix.out, STRIP, weight_bytes(g.matrix) + weight_bytes(u.matrix), threads, [&](int64_t begin, int64_t end) {
        multiply_part(g, for_gate, gate, begin, end);
        multiply_part(u, for_up, up, begin, end);
        active->gate_with(activation, gate + begin, up + begin, end - begin);
    });
}

// The same where one product has the outputs of both, in turn; `both` is worked in.
void multiply_gate_in_turn(const Product &p, Row &row, Activation activation, float *gate, float *up, float *both, int threads) {
    const Rows &rows = row.for_kind(p.matrix.kind);
    share_out(p.matrix.out, STRIP, weight_bytes(p.matrix), threads, [&](int64_t begin, int64_t end) {
        multiply_part(p, rows, both, begin, end);
        for (int64_t i = begin / 2; i < end / 2; ++i) {
            gate[i] = both[2 * i];
            up[i] = both[2 * i + 1];
        }
        active->gate_with(activation, gate + begin / 2, up + begin / 2, (end - begin) / 2);
    });
}
