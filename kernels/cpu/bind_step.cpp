// A decode step's compiled calls for ../step.py and ../token_step.py: a layer but for its attention in two, the output head in
// one, and all layers with their attention in one.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "read_state.h"
#include "select_layer.h"
#include "threads.h"
#include "turn.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

#include "half.h"
#include "store.h"
#include "row_products.h"
#include "layer_step.h"
#include "token_step.h"

// Blocks of one matrix, each in a place of its own, that take the same row, normed where there is a norm: the output head.
class BlockProduct {
public:
    BlockProduct(const std::vector<int64_t> &numbers, uintptr_t norm, double offset, double eps)
        : norm_(at<const float>(norm)), offset_((float)offset), eps_((float)eps) {
        Reader reader{numbers};
        while (reader.next < numbers.size()) blocks_.push_back(reader.product());
        if (blocks_.empty()) throw std::invalid_argument("a product needs a matrix");
    }

    void run(uintptr_t x, uintptr_t out, int threads) const {
        const float *from = at<const float>(x);
        const int64_t in = blocks_[0].matrix.in;
        if (norm_) {
            float *normed = Scratch::of(scratch.normed, in);
            active->rms_norm(from, norm_, offset_, eps_, in, normed);
            from = normed;
        }
        Row row(from, in);
        std::vector<Target> targets;
        float *to = at<float>(out);
        for (const Product &block : blocks_) {
            targets.push_back({&block, to});
            to += block.matrix.out;
        }
        multiply_each(row, targets.data(), (int)targets.size(), threads);
    }

private:
    const float *norm_;
    float offset_, eps_;
    std::vector<Product> blocks_;
};

// out += share * the output of one routed expert, of the row x. numbers: products as ../step.py gives them, gate and up or both in
// one, then down.
void add_expert(const std::vector<int64_t> &numbers, uintptr_t x, double share, int activation, uintptr_t out, int threads) {
    Reader reader{numbers};
    std::vector<Product> products;
    while (reader.next < numbers.size()) products.push_back(reader.product());
    if (products.size() != 2 && products.size() != 3) throw std::invalid_argument("this is not an expert");
    const Product &down = products.back();
    const int64_t inner = down.matrix.in, hidden = down.matrix.out;
    const bool is_in_turn = products.size() == 2;
    if (products[0].matrix.out != (is_in_turn ? 2 * inner : inner) || products[products.size() - 2].matrix.out != products[0].matrix.out ||
        products[products.size() - 2].matrix.in != products[0].matrix.in)
        throw std::invalid_argument("this is not an expert");
    Row row(at<const float>(x), products[0].matrix.in);
    float *gate = Scratch::of(scratch.first, inner), *up = Scratch::of(scratch.second, inner > hidden ? inner : hidden);
    if (is_in_turn)
        multiply_gate_in_turn(products[0], row, (Activation)activation, gate, up, Scratch::of(scratch.normed, 2 * inner), threads);
    else
        multiply_gate(products[0], products[1], row, (Activation)activation, gate, up, threads);
    Row gated(gate, inner);
    const Target target{&down, up};
    multiply_each(gated, &target, 1, threads);
    const float weight = (float)share;
    float *to = at<float>(out);
    for (int64_t i = 0; i < hidden; ++i) to[i] += up[i] * weight;
}

Angles angles_at(uintptr_t cosines, uintptr_t sines) { return {at<const float>(cosines), at<const float>(sines)}; }

void project(const LayerStep &step, uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, uintptr_t q, uintptr_t k,
             uintptr_t v, int threads) {
    step.project(at<const float>(x), angles_at(cosines, sines), scale, at<float>(q), at<float>(k), at<float>(v), threads);
}

void project_into(const LayerStep &step, uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, uintptr_t q,
                  const std::vector<int64_t> &places, int kind, int threads) {
    Reader reader{places};
    std::vector<RowPlace> to;
    while (reader.next < places.size()) to.push_back(read_place(reader).of_first);
    step.project_into(at<const float>(x), angles_at(cosines, sines), scale, at<float>(q), to.data(), (int64_t)to.size(),
                      (RawKind)kind, threads);
}

void add_attention(const LayerStep &step, uintptr_t x, uintptr_t attended, uintptr_t out, int threads) {
    step.add_attention(at<const float>(x), at<const float>(attended), at<float>(out), threads);
}

void add_mlp(const LayerStep &step, uintptr_t x, uintptr_t out, int threads) {
    step.add_mlp(at<const float>(x), at<float>(out), threads);
}

void mix(const LayerStep &step, uintptr_t x, uintptr_t attended, uintptr_t out, int threads) {
    step.mix(at<const float>(x), at<const float>(attended), at<float>(out), threads);
}

// Asks Python: a callable that takes a layer and gives an iterator of (address of positions, address of records, count).
class PythonComing : public Coming {
public:
    explicit PythonComing(nb::handle ask) : ask_(ask) {}
    ~PythonComing() override {
        nb::gil_scoped_acquire held;
        parts_.reset();
    }

    void begin(int64_t layer) override {
        nb::gil_scoped_acquire held;
        if (ask_.is_none()) throw std::invalid_argument("nobody brings what does not lie in memory");
        parts_ = nb::iter(ask_(layer));
    }

    bool next(Part &part) override {
        nb::gil_scoped_acquire held;
        const nb::object given = nb::steal(PyIter_Next(parts_.ptr()));
        if (!given.is_valid()) {
            if (PyErr_Occurred()) throw nb::python_error();
            return false;
        }
        const auto [positions, records, count] = nb::cast<std::tuple<uintptr_t, uintptr_t, int64_t>>(given);
        part = {at<const int64_t>(positions), at<const uint8_t *const>(records), count};
        return true;
    }

private:
    nb::handle ask_;
    nb::object parts_;
};

// at_hand: the addresses of its three arrays and its record_bytes, or none at all. reported: the addresses of chosen, figures, q,
// shares and log_total, or none at all; row and looked_at as in Reported.
void run_token(const TokenStep &step, uintptr_t x, double scale, const std::vector<int64_t> &numbers, uintptr_t tables,
               const std::vector<int64_t> &at_hand, nb::handle ask, uintptr_t out, const std::vector<int64_t> &reported, int threads) {
    Reported to{nullptr, 0, nullptr, -1, nullptr, nullptr, nullptr};
    if (!reported.empty()) {
        Reader reader{reported};
        to.row = reader.number();
        to.looked_at = reader.number();
        to.chosen = at<int64_t>((uintptr_t)reader.number());
        to.figures = at<double>((uintptr_t)reader.number());
        to.q = at<float>((uintptr_t)reader.number());
        to.shares = at<float>((uintptr_t)reader.number());
        to.log_total = at<float>((uintptr_t)reader.number());
    }
    AtHand hand{nullptr, nullptr, nullptr, 0};
    if (!at_hand.empty()) {
        Reader reader{at_hand};
        hand.frame_of = reader.address<int64_t>();
        hand.states = reader.address<int8_t>();
        hand.frames = reader.address<uint8_t>();
        hand.record_bytes = reader.number();
    }
    PythonComing coming(ask);
    step.run(at<const float>(x), scale, numbers, at<const uintptr_t>(tables), hand, coming, at<float>(out), to, threads);
}

TokenStep *make_token_step(const std::vector<const LayerStep *> &steps, const std::vector<int64_t> &numbers,
                           const std::vector<double> &amplitudes, const std::vector<std::vector<int64_t>> &layouts, int raw_kind,
                           int64_t records_per_span, double softcap, double epsilon, bool by_unevenness, bool by_effect) {
    return new TokenStep(steps, numbers, amplitudes, layouts, raw_kind, records_per_span, softcap, {epsilon, by_unevenness, by_effect});
}

}  // namespace

void bind_step(nb::module_ &m) {
    // A program that ends with a model open leaves its steps behind; nobody wants to read that.
    nb::set_leak_warnings(false);
    typedef nb::call_guard<nb::gil_scoped_release> Released;
    nb::class_<LayerStep>(m, "LayerStep")
        .def(nb::init<const std::vector<int64_t> &, double, double, double>())
        .def("project", &project, Released())
        .def("project_into", &project_into, Released())
        .def("add_attention", &add_attention, Released())
        .def("add_mlp", &add_mlp, Released())
        .def("mix", &mix, Released());
    m.def("add_expert", &add_expert, Released());
    nb::class_<BlockProduct>(m, "BlockProduct")
        .def(nb::init<const std::vector<int64_t> &, uintptr_t, double, double>())
        .def("run", &BlockProduct::run, Released());
    nb::class_<TokenStep>(m, "TokenStep")
        .def(nb::new_(&make_token_step))
        .def("run", &run_token, nb::arg("x"), nb::arg("scale"), nb::arg("numbers"), nb::arg("tables"), nb::arg("at_hand"),
             nb::arg("ask").none(), nb::arg("out"), nb::arg("reported"), nb::arg("threads"), Released());
}

}  // namespace ebbtide
