// A decode step's compiled calls for ../step.py and ../token_step.py: a layer but for its attention in two, the output head in
// one, and all layers with their attention in one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "head_products.h"
#include "read_state.h"
#include "recur.h"
#include "select_layer.h"
#include "threads.h"
#include "turn.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

#include "half.h"
#include "store.h"
#include "row_products.h"
#include "routing.h"
#include "routed_step.h"
#include "layer_step.h"
#include "altup_step.h"
#include "state_step.h"
#include "token_step.h"

// out += share * the output of one routed expert, of the row x. numbers: as ../step.py's expert_numbers gives them.
void add_expert(const std::vector<int64_t> &numbers, uintptr_t x, double share, int activation, uintptr_t out, int threads) {
    Reader reader{numbers};
    const Expert expert(reader);
    add_experts({{&expert, (float)share}}, at<const float>(x), (Activation)activation, at<float>(out), threads);
}

// Rows of scores (rows, count), which are used up; numbers and shares are (rows, chosen).
void route_rows(const std::vector<int64_t> &routing, const std::vector<double> &floats, uintptr_t scores, int64_t rows,
                uintptr_t numbers, uintptr_t shares, int threads) {
    Reader reader{routing};
    const Routing r(reader, floats);
    share_out(rows, 1, rows * r.count * (r.chosen + 8) * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            route(r, at<float>(scores) + i * r.count, at<int64_t>(numbers) + i * r.chosen, at<float>(shares) + i * r.chosen);
    });
}

Angles angles_at(uintptr_t cosines, uintptr_t sines) { return {at<const float>(cosines), at<const float>(sines)}; }

void project(const LayerStep &step, uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, uintptr_t q, uintptr_t k,
             uintptr_t v, uintptr_t gate, int threads) {
    step.project(at<const float>(x), angles_at(cosines, sines), scale, at<float>(q), at<float>(k), at<float>(v), at<float>(gate),
                 threads);
}

void project_into(const LayerStep &step, uintptr_t x, uintptr_t cosines, uintptr_t sines, double scale, uintptr_t q,
                  uintptr_t gate, const std::vector<int64_t> &places, int kind, int threads) {
    Reader reader{places};
    std::vector<RowPlace> to;
    while (reader.next < places.size()) {
        uint8_t *keys = reader.address<uint8_t>(), *values = reader.address<uint8_t>();
        to.push_back({keys, values, reader.number()});
    }
    step.project_into(at<const float>(x), angles_at(cosines, sines), scale, at<float>(q), at<float>(gate), to.data(),
                      (int64_t)to.size(), (RawKind)kind, threads);
}

void add_attention(const LayerStep &step, uintptr_t x, uintptr_t attended, uintptr_t out, int threads) {
    step.add_attention(at<const float>(x), at<const float>(attended), at<float>(out), threads);
}

void add_mlp(const LayerStep &step, uintptr_t x, uintptr_t entered, uintptr_t out, int threads) {
    step.add_mlp(at<const float>(x), at<const float>(entered), at<float>(out), threads);
}

void mix(const LayerStep &step, uintptr_t x, uintptr_t attended, uintptr_t beside, uintptr_t out, int threads) {
    step.mix(at<const float>(x), at<const float>(attended), at<const float>(beside), nullptr, at<float>(out), threads);
}

void end(const LayerStep &step, uintptr_t x, uintptr_t inputs, uintptr_t out, int threads) {
    step.end(at<const float>(x), at<const float>(inputs), at<float>(out), threads);
}

// numbers: of the norm, then of each block; offset, eps: of the norm.
BlockProduct *make_block_product(const std::vector<int64_t> &numbers, double offset, double eps) {
    Reader reader{numbers};
    const double floats[] = {offset, eps};
    const Norm norm = read_norm(reader, floats);
    std::vector<Product> blocks;
    while (reader.next < numbers.size()) blocks.push_back(read_product(reader));
    return new BlockProduct(std::move(blocks), norm);
}

RecurrentStep *make_recurrent_step(const BlockProduct &projections, const BlockProduct *gate, const BlockProduct *steps,
                                   const std::vector<int64_t> &numbers, const std::vector<double> &floats) {
    return new RecurrentStep(projections, gate, steps, numbers, floats);
}

ScanStep *make_scan_step(const BlockProduct &inputs, const BlockProduct &few, const BlockProduct &steps,
                         const std::vector<int64_t> &numbers, const std::vector<double> &floats) {
    return new ScanStep(inputs, few, steps, numbers, floats);
}

void run_product(const BlockProduct &product, uintptr_t x, uintptr_t out, int threads) {
    product.run(at<const float>(x), at<float>(out), threads);
}

void run_state(const StateStep &step, uintptr_t x, const std::vector<int64_t> &state, uintptr_t out, int threads) {
    step.run(at<const float>(x), state_at(state), at<float>(out), threads);
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
void run_token(const TokenStep &step, uintptr_t x, const std::vector<double> &scales, const std::vector<int64_t> &numbers, uintptr_t tables,
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
        hand.frame_of = reader.address<const int64_t>();
        hand.states = reader.address<const int8_t>();
        hand.frames = reader.address<const uint8_t>();
        hand.record_bytes = reader.number();
    }
    PythonComing coming(ask);
    step.run(at<const float>(x), scales, numbers, at<const uintptr_t>(tables), hand, coming, at<float>(out), to, threads);
}

TokenStep *make_token_step(const std::vector<const LayerStep *> &steps, const std::vector<const StateStep *> &states,
                           const std::vector<const RoutedStep *> &experts, const std::vector<const AltUpStep *> &streams,
                           const std::vector<int64_t> &numbers, const std::vector<double> &amplitudes,
                           const std::vector<std::vector<int64_t>> &layouts, int raw_kind, int64_t records_per_span, double softcap,
                           double epsilon, bool by_unevenness, bool by_effect) {
    return new TokenStep(steps, states, experts, streams, numbers, amplitudes, layouts, raw_kind, records_per_span, softcap,
                         {epsilon, by_unevenness, by_effect});
}

}  // namespace

void bind_step(nb::module_ &m) {
    // A program that ends with a model open leaves its steps behind; nobody wants to read that.
    nb::set_leak_warnings(false);
    typedef nb::call_guard<nb::gil_scoped_release> Released;
    nb::class_<LayerStep>(m, "LayerStep")
        .def(nb::init<const std::vector<int64_t> &, const std::vector<double> &>())
        .def("project", &project, Released())
        .def("project_into", &project_into, Released())
        .def("add_attention", &add_attention, Released())
        .def("add_mlp", &add_mlp, Released())
        .def("mix", &mix, Released())
        .def("end", &end, Released());
    m.def("add_expert", &add_expert, Released());
    m.def("route", &route_rows, Released());
    nb::class_<RoutedStep>(m, "RoutedStep").def(nb::init<const std::vector<int64_t> &, const std::vector<double> &>());
    nb::class_<AltUpStep>(m, "AltUpStep").def(nb::init<const std::vector<int64_t> &, double>());
    nb::class_<BlockProduct>(m, "BlockProduct")
        .def(nb::new_(&make_block_product))
        .def("run", &run_product, Released());
    nb::class_<StateStep>(m, "StateStep").def("run", &run_state, Released());
    nb::class_<RecurrentStep, StateStep>(m, "RecurrentStep")
        .def(nb::new_(&make_recurrent_step), nb::arg("projections"), nb::arg("gate").none(), nb::arg("steps").none(), nb::arg("numbers"),
             nb::arg("floats"));
    nb::class_<ScanStep, StateStep>(m, "ScanStep").def(nb::new_(&make_scan_step));
    nb::class_<TokenStep>(m, "TokenStep")
        .def(nb::new_(&make_token_step))
        .def("run", &run_token, nb::arg("x"), nb::arg("scales"), nb::arg("numbers"), nb::arg("tables"), nb::arg("at_hand"),
             nb::arg("ask").none(), nb::arg("out"), nb::arg("reported"), nb::arg("threads"), Released());
}

}  // namespace ebbtide
