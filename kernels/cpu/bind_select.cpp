// The steps of attention over some records of a layer, for ../score.py, ../bounds.py, ../selection.py, ../effect.py and ../means.py,
// and all of them for ../layer_selection.py.
#include "bindings.h"
#include "select_layer.h"

namespace nb = nanobind;
using namespace ebbtide;

namespace {

// near is an array of addresses, one for each record, here and below.
void score(uintptr_t q, int64_t rows, uintptr_t near, const std::vector<int64_t> &numbers, int64_t num_records,
           uintptr_t bias, float softcap, uintptr_t log_mass, uintptr_t unevenness, int threads) {
    const Layout l = layout_of(numbers);
    const int64_t pages = num_records * l.pages_per_record;
    const Score s{l, rows, pages * l.page_tokens, pages, nullptr, at<const float>(bias), softcap,
                  at<const uint8_t *const>(near), at<float>(log_mass), at<float>(unevenness)};
    nb::gil_scoped_release released;
    score_all(*active, s, at<const float>(q), num_records, threads);
}

void bound(uintptr_t q, int64_t rows, uintptr_t near, const std::vector<int64_t> &numbers, int64_t num_records, uintptr_t bounds,
           int threads) {
    const Layout l = layout_of(numbers);
    const Bounds b{l, rows, num_records * l.pages_per_record, nullptr, at<const uint8_t *const>(near), at<float>(bounds)};
    nb::gil_scoped_release released;
    bound_all(*active, b, at<const float>(q), num_records, threads);
}

void page_shares(uintptr_t log_mass, uintptr_t raw_log_mass, int64_t rows, int64_t num_pages, uintptr_t shares,
                 uintptr_t log_total, int threads) {
    const Shares s{num_pages, at<const float>(log_mass), at<const float>(raw_log_mass), at<float>(shares), at<float>(log_total)};
    nb::gil_scoped_release released;
    share_all(*active, s, rows, threads);
}

int64_t choose(uintptr_t shares, uintptr_t unevenness, uintptr_t effect, int64_t rows, int64_t num_pages, int64_t pages_per_record,
               double epsilon, uintptr_t ranked, int threads) {
    const Costs c{rows, num_pages, pages_per_record, at<const float>(shares), at<const float>(unevenness), at<const float>(effect)};
    nb::gil_scoped_release released;
    return choose_records(*active, c, epsilon, at<int64_t>(ranked), threads);
}

void stand_raw(uintptr_t q, int64_t rows, const std::vector<int64_t> &numbers, int kind, const std::vector<int64_t> &runs,
               uintptr_t null_scores, float softcap, uintptr_t output_norms, uintptr_t x, int64_t hidden, uintptr_t highest,
               uintptr_t total, uintptr_t out, uintptr_t log_mass, uintptr_t effect, int threads) {
    const Layout l = layout_of(numbers);
    const std::vector<RawRun> held = runs_of(runs);
    Standing s{raw_attend(kind, l.kv_heads, l.head_dim, rows, q, softcap, held, null_scores),
               at<const float>(output_norms), at<const float>(x), hidden};
    s.raw.value_first = l.value_first();
    nb::gil_scoped_release released;
    stand(*active, s, at<float>(highest), at<float>(total), at<float>(out), at<float>(log_mass), at<float>(effect), threads);
}

// shares are used up: those of chosen records become 0.
void left_out(uintptr_t shares, uintptr_t unevenness, int64_t rows, uintptr_t near, const std::vector<int64_t> &numbers,
              int64_t num_records, uintptr_t chosen, int64_t num_chosen, uintptr_t missed, uintptr_t misplaced, uintptr_t out,
              int threads) {
    const Layout l = layout_of(numbers);
    const int64_t pages = num_records * l.pages_per_record;
    const int64_t *const numbers_of = at<const int64_t>(chosen);
    for (int64_t i = 0; i < num_chosen; ++i)
        if (numbers_of[i] < 0 || numbers_of[i] >= num_records) throw std::invalid_argument("a record that is not there was chosen");
    const LeftOut left{pages, l.pages_per_record, num_chosen, numbers_of, at<float>(shares), at<const float>(unevenness),
                       at<float>(missed), at<float>(misplaced)};
    nb::gil_scoped_release released;
    attend_left_out(*active, left, {l, rows, pages, nullptr, at<const uint8_t *const>(near)}, at<float>(out), threads);
}

// A LayerSelection and what it was given, for ../layer_selection.py.
class HeldSelection {
public:
    int64_t choose(uintptr_t q, uintptr_t page_q, int64_t rows, uintptr_t near, int64_t num_records, const std::vector<int64_t> &numbers,
                   float softcap, uintptr_t bias, int kind, const std::vector<int64_t> &runs, uintptr_t null_scores,
                   uintptr_t output_norms, uintptr_t x, int64_t hidden, double epsilon, bool by_unevenness, bool by_effect, uintptr_t chosen, int threads) {
        const Layout l = layout_of(numbers);
        runs_ = runs_of(runs);
        given_ = {{raw_attend(kind, l.kv_heads, l.head_dim, rows, q, softcap, runs_, null_scores), at<const float>(output_norms),
                   at<const float>(x), hidden},
                  {l, rows, 0, 0, 0, at<const float>(page_q), at<const float>(bias), softcap, at<const uint8_t *const>(near), nullptr},
                  num_records, l.page_tokens};
        given_.standing.raw.value_first = l.value_first();
        is_estimated_ = false;
        nb::gil_scoped_release released;
        selection_.choose(*active, given_, {epsilon, by_unevenness, by_effect}, threads);
        std::copy(selection_.chosen.begin(), selection_.chosen.end(), at<int64_t>(chosen));
        return (int64_t)selection_.chosen.size();
    }

    void known(uintptr_t raw_log_mass, uintptr_t effect) const {
        selection_.known(given_.standing.num_rows(), at<float>(raw_log_mass), at<float>(effect));
    }

    void estimate(uintptr_t chosen, int64_t count, int threads) {
        const int64_t *from = at<const int64_t>(chosen);
        for (int64_t i = 0; i < count; ++i)
            if (from[i] < 0 || from[i] >= given_.num_records) throw std::invalid_argument("a record that is not there was chosen");
        selection_.chosen.assign(from, from + count);
        nb::gil_scoped_release released;
        selection_.estimate(*active, given_, threads);
        is_estimated_ = true;
    }

    // positions, records: (count) each.
    void attend(uintptr_t positions, int64_t count, uintptr_t records, int threads) {
        check_estimated();
        const int64_t *some = at<const int64_t>(positions);
        for (int64_t i = 0; i < count; ++i)
            if (some[i] < 0 || some[i] >= (int64_t)selection_.chosen.size()) throw std::invalid_argument("a record that was not chosen");
        nb::gil_scoped_release released;
        selection_.attend(*active, given_, some, count, at<const uint8_t *const>(records), threads);
    }

    std::vector<double> finish(uintptr_t out, int threads) {
        check_estimated();
        std::vector<double> figures(4);
        nb::gil_scoped_release released;
        selection_.finish(*active, given_, at<float>(out), threads);
        selection_.figures(given_.standing.num_rows(), figures.data());
        return figures;
    }

    int64_t num_pages() const { return given_.num_pages(); }

    void left_out(uintptr_t shares, uintptr_t log_total) const {
        check_estimated();
        selection_.left_out(given_.standing.num_rows(), given_.num_pages(), at<float>(shares), at<float>(log_total));
    }

private:
    void check_estimated() const {
        if (!is_estimated_) throw std::invalid_argument("what is left out must be estimated first");
    }

    bool is_estimated_ = false;
    std::vector<RawRun> runs_;
    SelectLayer given_{};
    LayerSelection selection_;
};

}  // namespace

void ebbtide::bind_select(nb::module_ &m) {
    m.def("score", &score);
    m.def("bound", &bound);
    m.def("page_shares", &page_shares);
    m.def("choose", &choose, "How many records were written to `ranked`.");
    m.def("stand_raw", &stand_raw);
    m.def("left_out", &left_out);
    nb::class_<HeldSelection>(m, "LayerSelection")
        .def(nb::init<>())
        .def("choose", &HeldSelection::choose)
        .def("known", &HeldSelection::known)
        .def("estimate", &HeldSelection::estimate)
        .def("attend", &HeldSelection::attend)
        .def("finish", &HeldSelection::finish)
        .def("num_pages", &HeldSelection::num_pages)
        .def("left_out", &HeldSelection::left_out);
}
