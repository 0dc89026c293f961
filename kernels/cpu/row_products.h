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
            if (from < to) {
                float *out = targets[t].out;
                active->multiply(p.matrix, row.for_kind(p.matrix.kind), out, p.matrix.out, from, to);
                if (p.bias)
                    for (int64_t i = from; i < to; ++i) out[i] += p.bias[i];
            }
            start = stop;
        }
    });
}
