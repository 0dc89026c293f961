// A layer's decode step but for its attention, for ../step.py: one row, in one call up to the queries, keys and values,
// and in another from what was attended to the residual. Products are shared out among threads; what stands between
// them is too little to share.
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "threads.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

#include "half.h"

uint16_t bf16_nearest(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // ties to even
}

uint16_t f16_nearest(float x) { return x != x ? 0x7e00 : half_nearest(x); }

// A row of keys or values, (heads, dim) float32, to where its heads lie head_bytes apart, in another kind of float.
void store_heads(WeightKind kind, const float *from, uint8_t *to, int64_t head_bytes, int64_t heads, int64_t dim) {
    for (int64_t h = 0; h < heads; ++h, from += dim, to += head_bytes) {
        if (kind == WEIGHT_F32)
            std::memcpy(to, from, (size_t)dim * sizeof(float));
        else
            for (int64_t i = 0; i < dim; ++i)
                ((uint16_t *)to)[i] = kind == WEIGHT_BF16 ? bf16_nearest(from[i]) : f16_nearest(from[i]);
    }
}

// A product with its bias; absent where weight is null. The numbers are in the order that ../step.py gives.
struct Product {
    Matrix matrix;
    const float *bias;

    bool is_there() const { return matrix.weight != nullptr; }
};

constexpr int NORMS = 6;

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

int64_t weight_bytes(const Matrix &m) {
    static constexpr double EACH[] = {4, 2, 2, 1.0625, 0.5625};
    return (int64_t)(EACH[m.kind] * (double)(m.in * m.out));
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

    // Queries (scaled), keys and values of the residual row x. cosines and sines: of its position, rope_width each.
    void project(uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, uintptr_t q, uintptr_t k, uintptr_t v,
                 int threads) {
        nb::gil_scoped_release released;
        project_to(x, cosines, sines, scale, at<float>(q), at<float>(k), at<float>(v), threads);
    }

    // The same, but keys and values go to where heads lie head_bytes apart, in floats of a kind.
    void project_into(uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, uintptr_t q, uintptr_t keys,
                      uintptr_t values, int64_t head_bytes, int kind, int threads) {
        nb::gil_scoped_release released;
        const int64_t width = products_[K].matrix.out;
        float *k = Scratch::of(scratch.first, width), *v = Scratch::of(scratch.second, width);
        project_to(x, cosines, sines, scale, at<float>(q), k, v, threads);
        store_heads((WeightKind)kind, k, at<uint8_t>(keys), head_bytes, width / head_dim_, head_dim_);
        store_heads((WeightKind)kind, v, at<uint8_t>(values), head_bytes, width / head_dim_, head_dim_);
    }

    // The residual row x plus the output of attention, to out.
    void add_attention(uintptr_t x, uintptr_t attended, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        attention_onto(at<const float>(x), at<const float>(attended), at<float>(out), threads);
    }

    // The residual row x plus the output of the MLP, to out.
    void add_mlp(uintptr_t x, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        mlp_onto(at<const float>(x), at<float>(out), threads);
    }

    // Both, one after the other.
    void mix(uintptr_t x, uintptr_t attended, uintptr_t out, int threads) {
        nb::gil_scoped_release released;
        attention_onto(at<const float>(x), at<const float>(attended), at<float>(out), threads);
        mlp_onto(at<const float>(out), at<float>(out), threads);
    }

private:
    enum { Q, K, V, O, GATE, UP, DOWN, PRODUCTS };
    enum { NORM_BEFORE_ATTENTION, NORM_Q, NORM_K, NORM_AFTER_ATTENTION, NORM_BEFORE_MLP, NORM_AFTER_MLP };

    void project_to(uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, float *q, float *k, float *v,
                    int threads) const {
        Row row(normed(NORM_BEFORE_ATTENTION, at<const float>(x)), hidden_);
        const Target targets[] = {{&products_[Q], q}, {&products_[K], k}, {&products_[V], v}};
        multiply_each(row, targets, 3, threads);
        const float *cos = at<const float>(cosines), *sin = at<const float>(sines);
        finish_heads(q, products_[Q].matrix.out, NORM_Q, cos, sin, (float)scale);
        finish_heads(k, products_[K].matrix.out, NORM_K, cos, sin, 1.0f);
    }

    // x normed, or x itself where the layer has no norm there. Good until the next call.
    const float *normed(int which, const float *x) const {
        if (!norms_[which]) return x;
        float *out = Scratch::of(scratch.normed, hidden_);
        active->rms_norm(x, norms_[which], offset_, eps_, hidden_, out);
        return out;
    }

    void attention_onto(const float *x, const float *attended, float *out, int threads) const {
        const Product &o = products_[O];
        Row row(attended, o.matrix.in);
        float *added = Scratch::of(scratch.first, hidden_);
        const Target target{&o, added};
        multiply_each(row, &target, 1, threads);
        join(x, normed(NORM_AFTER_ATTENTION, added), out);
    }

    void mlp_onto(const float *x, float *out, int threads) const {
        const Product &down = products_[DOWN];
        const int64_t inner = down.matrix.in;
        float *gate = Scratch::of(scratch.first, inner), *up = Scratch::of(scratch.second, inner > hidden_ ? inner : hidden_);
        Row row(normed(NORM_BEFORE_MLP, x), hidden_);
        multiply_gate(row, gate, up, threads);
        Row gated(gate, inner);
        const Target target{&down, up};
        multiply_each(gated, &target, 1, threads);
        join(x, normed(NORM_AFTER_MLP, up), out);
    }

    // gate = activation(gate product) * (up product): each part of the range does both of its own outputs.
    void multiply_gate(Row &row, float *gate, float *up, int threads) const {
        const Product &g = products_[GATE], &u = products_[UP];
        const Rows &for_gate = row.for_kind(g.matrix.kind), &for_up = row.for_kind(u.matrix.kind);
        const int64_t bytes = weight_bytes(g.matrix) + weight_bytes(u.matrix);
        share_out(g.matrix.out, STRIP, bytes, threads, [&](int64_t begin, int64_t end) {
            active->multiply(g.matrix, for_gate, gate, g.matrix.out, begin, end);
            active->multiply(u.matrix, for_up, up, u.matrix.out, begin, end);
            if (g.bias)
                for (int64_t i = begin; i < end; ++i) gate[i] += g.bias[i];
            if (u.bias)
                for (int64_t i = begin; i < end; ++i) up[i] += u.bias[i];
            active->gate_with(activation_, gate + begin, up + begin, end - begin);
        });
    }

    void join(const float *x, const float *added, float *out) const {
        if (multiplier_ == 1.0f)
            for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] + added[i];
        else
            for (int64_t i = 0; i < hidden_; ++i) out[i] = x[i] + added[i] * multiplier_;
    }

    // Norm, rotation and scale of all heads of queries or keys, in place.
    void finish_heads(float *x, int64_t width, int which, const float *cosines, const float *sines, float scale) const {
        if (qk_norm_ == ALL_HEADS) active->rms_norm(x, norms_[which], offset_, eps_, width, x);
        for (float *head = x; head < x + width; head += head_dim_) {
            if (qk_norm_ == EACH_HEAD) active->rms_norm(head, norms_[which], offset_, eps_, head_dim_, head);
            is_interleaved_ ? turn_pairs(head, cosines, sines) : turn_halves(head, cosines, sines);
            if (scale != 1.0f)
                for (int64_t i = 0; i < head_dim_; ++i) head[i] *= scale;
        }
    }

    void turn_halves(float *x, const float *cosines, const float *sines) const {
        const int64_t half = rope_width_ / 2;
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + half] = b * cosines[i + half] + a * sines[i + half];
        }
    }

    void turn_pairs(float *x, const float *cosines, const float *sines) const {
        for (int64_t i = 0; i + 1 < rope_width_; i += 2) {
            const float a = x[i], b = x[i + 1];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + 1] = b * cosines[i + 1] + a * sines[i + 1];
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

// Blocks of one matrix, each in a place of its own, that take the same row: the output head.
class BlockProduct {
public:
    explicit BlockProduct(const std::vector<int64_t> &numbers) {
        Reader reader{numbers};
        while (reader.next < numbers.size()) blocks_.push_back(reader.product());
        if (blocks_.empty()) throw std::invalid_argument("a product needs a matrix");
    }

    void run(uintptr_t x, uintptr_t out, int threads) const {
        nb::gil_scoped_release released;
        Row row(at<const float>(x), blocks_[0].matrix.in);
        std::vector<Target> targets;
        float *to = at<float>(out);
        for (const Product &block : blocks_) {
            targets.push_back({&block, to});
            to += block.matrix.out;
        }
        multiply_each(row, targets.data(), (int)targets.size(), threads);
    }

private:
    std::vector<Product> blocks_;
};

}  // namespace

void bind_step(nb::module_ &m) {
    // A program that ends with a model open leaves its steps behind; nobody wants to read that.
    nb::set_leak_warnings(false);
    nb::class_<LayerStep>(m, "LayerStep")
        .def(nb::init<const std::vector<int64_t> &, double, double, double>())
        .def("project", &LayerStep::project)
        .def("project_into", &LayerStep::project_into)
        .def("add_attention", &LayerStep::add_attention)
        .def("add_mlp", &LayerStep::add_mlp)
        .def("mix", &LayerStep::mix);
    nb::class_<BlockProduct>(m, "BlockProduct")
        .def(nb::init<const std::vector<int64_t> &>())
        .def("run", &BlockProduct::run);
}

}  // namespace ebbtide
