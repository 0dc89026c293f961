// Attention over pages and raw tokens, and merging, for ../paged_attention.py and ../layer_attention.py.
#include "bindings.h"
#include "select_layer.h"

namespace nb = nanobind;
using namespace ebbtide;

namespace {

// near and records are arrays of addresses, one for each record, everywhere below.
Attend over_records(const Layout &l, uintptr_t q, int64_t rows, uintptr_t near, uintptr_t records, int64_t num_records,
                    int64_t visible_from, int64_t visible_to, uintptr_t bias, float softcap) {
    return {l, rows, num_records * l.pages_per_record * l.page_tokens, visible_from, visible_to, at<const float>(q),
            at<const float>(bias), softcap, at<const uint8_t *const>(near), at<const uint8_t *const>(records)};
}

// One partial for each record and head, record by record.
void attend_records(uintptr_t q, int64_t rows, uintptr_t near, uintptr_t records, const std::vector<int64_t> &numbers,
                    int64_t num_records, int64_t skip_first, uintptr_t bias, float softcap, uintptr_t highest,
                    uintptr_t total, uintptr_t out, int threads) {
    const Layout l = layout_of(numbers);
    const Attend a = over_records(l, q, rows, near, records, num_records, skip_first,
                                  num_records * l.pages_per_record * l.page_tokens, bias, softcap);
    nb::gil_scoped_release released;
    attend_each(*active, a, num_records, at<float>(highest), at<float>(total), at<float>(out), threads);
}

// One partial for each span and head, span by span.
void attend_spans(uintptr_t q, int64_t rows, uintptr_t near, uintptr_t records, const std::vector<int64_t> &numbers,
                  int64_t num_records, int64_t records_per_span, int64_t visible_from, int64_t visible_to, uintptr_t bias,
                  float softcap, uintptr_t highest, uintptr_t total, uintptr_t out, int threads) {
    const Layout l = layout_of(numbers);
    const Attend a = over_records(l, q, rows, near, records, num_records, visible_from, visible_to, bias, softcap);
    nb::gil_scoped_release released;
    const Kernels &kernels = *active;
    const int64_t num_spans = (num_records + records_per_span - 1) / records_per_span;
    take_turns(num_spans * l.kv_heads, num_records * l.record_bytes, kernels.attend_scratch(l, rows), threads,
               [&](int64_t i, float *scratch) {
                   const int64_t first = i / l.kv_heads * records_per_span, left = num_records - first;
                   kernels.attend_span(a, i % l.kv_heads, first, left < records_per_span ? left : records_per_span, scratch,
                                       at<float>(highest) + i * rows, at<float>(total) + i * rows,
                                       at<float>(out) + i * rows * l.head_dim);
               });
}

// The partial of raw tokens, one for each head.
void attend_raw(uintptr_t q, int64_t kv_heads, int64_t rows, int64_t dim, int kind, const std::vector<int64_t> &runs,
                float softcap, uintptr_t highest, uintptr_t total, uintptr_t out, int threads) {
    const std::vector<RawRun> held = runs_of(runs);
    const RawAttend a{(RawKind)kind, kv_heads, dim, rows, at<const float>(q), softcap, held.data(), (int64_t)held.size()};
    nb::gil_scoped_release released;
    const Kernels &kernels = *active;
    int64_t tokens = 0;
    for (const RawRun &run : held) tokens += run.tokens;
    take_turns(kv_heads, 4 * tokens * kv_heads * dim, kernels.raw_scratch(a), threads, [&](int64_t head, float *scratch) {
        kernels.attend_raw(a, head, scratch, at<float>(highest) + head * rows, at<float>(total) + head * rows,
                           at<float>(out) + head * rows * dim);
    });
}

// Everything: sealed spans, raw tokens, and their join, divided by its total.
void attend_all(uintptr_t q, uintptr_t page_q, int64_t rows, uintptr_t near, uintptr_t records,
                const std::vector<int64_t> &numbers, int64_t num_records, int64_t records_per_span, int64_t visible_from,
                int64_t visible_to, uintptr_t bias, float softcap, int kind, const std::vector<int64_t> &runs, uintptr_t out,
                int threads) {
    const Layout l = layout_of(numbers);
    const std::vector<RawRun> held = runs_of(runs);
    const LayerAttend a{over_records(l, page_q, rows, near, records, num_records, visible_from, visible_to, bias, softcap),
                        num_records, records_per_span,
                        {(RawKind)kind, l.kv_heads, l.head_dim, rows, at<const float>(q), softcap, held.data(),
                         (int64_t)held.size()}};
    nb::gil_scoped_release released;
    attend_layer(*active, a, at<float>(out), threads);
}

// `count` partials of `rows` rows, spans first and then one of raw tokens, to one, divided by its total. They are used up.
void join_spans(int64_t count, int64_t rows, int64_t dim, uintptr_t highest, uintptr_t total, uintptr_t out, uintptr_t to_out,
                int threads) {
    nb::gil_scoped_release released;
    share_out(rows, 1, count * rows * dim * 4, threads, [&](int64_t begin, int64_t end) {
        active->join_spans(count, count - 1, rows, dim, at<float>(highest), at<float>(total), at<float>(out),
                                    at<float>(to_out), begin, end);
    });
}

// scores (rows, n), to weights in place.
void soften(uintptr_t scores, int64_t rows, int64_t n, uintptr_t highest, uintptr_t total, int threads) {
    nb::gil_scoped_release released;
    share_out(rows, 1, rows * n * 8, threads, [&](int64_t begin, int64_t end) {
        active->soften_rows(at<float>(scores), n, at<float>(highest), at<float>(total), begin, end);
    });
}

// What turned key biases add to scores: ../rope_scores.py has the shapes.
void rope_scores(uintptr_t cosines, uintptr_t sines, uintptr_t constant, uintptr_t frequencies, int64_t rows, int64_t pairs,
                 int64_t start, int64_t count, uintptr_t out, int threads) {
    if (pairs > 512) throw std::invalid_argument("more than 512 pairs of elements are turned");
    const RopeScores a{rows, pairs, start, count, at<const float>(cosines), at<const float>(sines), at<const float>(constant),
                       at<const float>(frequencies), at<float>(out)};
    nb::gil_scoped_release released;
    share_out(count, 16, rows * count * pairs, threads, [&](int64_t begin, int64_t end) { active->rope_scores(a, begin, end); });
}

void merge(int64_t chunks, int64_t rows, int64_t dim, uintptr_t highest, uintptr_t total, uintptr_t out,
           uintptr_t to_highest, uintptr_t to_total, uintptr_t to_out, int threads) {
    nb::gil_scoped_release released;
    share_out(rows, 1, chunks * rows * dim * 4, threads, [&](int64_t begin, int64_t end) {
        active->merge_chunks(chunks, rows, dim, at<const float>(highest), at<const float>(total),
                                      at<const float>(out), at<float>(to_highest), at<float>(to_total), at<float>(to_out),
                                      begin, end);
    });
}

}  // namespace

void ebbtide::bind_attend(nb::module_ &m) {
    m.def("attend_records", &attend_records);
    m.def("attend_spans", &attend_spans);
    m.def("attend_raw", &attend_raw);
    m.def("attend_layer", &attend_all);
    m.def("join_spans", &join_spans);
    m.def("soften", &soften);
    m.def("rope_scores", &rope_scores);
    m.def("merge", &merge);
}
