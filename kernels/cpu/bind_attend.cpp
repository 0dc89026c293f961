// Attention over pages and raw tokens, and merging, for ../paged_attention.py and ../layer_attention.py.
#include <memory>

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
    attend_each(*active, a, nullptr, num_records, at<float>(highest), at<float>(total), at<float>(out), threads);
}

// One partial for each span and head, span by span; ATTEND_ROWS rows at a time.
void attend_spans(uintptr_t q, int64_t rows, uintptr_t near, uintptr_t records, const std::vector<int64_t> &numbers,
                  int64_t num_records, int64_t records_per_span, int64_t visible_from, int64_t visible_to, uintptr_t bias,
                  float softcap, uintptr_t highest, uintptr_t total, uintptr_t out, int threads) {
    const Layout l = layout_of(numbers);
    const Attend a = over_records(l, q, rows, near, records, num_records, visible_from, visible_to, bias, softcap);
    nb::gil_scoped_release released;
    const Kernels &kernels = *active;
    const int64_t num_spans = (num_records + records_per_span - 1) / records_per_span;
    const int64_t blocks = (rows + ATTEND_ROWS - 1) / ATTEND_ROWS;
    take_turns(num_spans * l.kv_heads * blocks, num_records * l.record_bytes * blocks,
               kernels.attend_scratch(l, rows < ATTEND_ROWS ? rows : ATTEND_ROWS), threads, [&](int64_t i, float *scratch) {
                   const int64_t part = i / blocks, record = part / l.kv_heads * records_per_span, left = num_records - record;
                   Attend some = a;
                   some.first_row = i % blocks * ATTEND_ROWS;
                   some.rows = rows - some.first_row < ATTEND_ROWS ? rows - some.first_row : ATTEND_ROWS;
                   const int64_t row = part * rows + some.first_row;
                   kernels.attend_span(some, part % l.kv_heads, record, left < records_per_span ? left : records_per_span, scratch,
                                       at<float>(highest) + row, at<float>(total) + row, at<float>(out) + row * l.head_dim);
               });
}

// The partial of raw tokens, one for each head.
void attend_raw(uintptr_t q, int64_t kv_heads, int64_t rows, int64_t dim, int kind, const std::vector<int64_t> &runs,
                uintptr_t null_scores, float softcap, uintptr_t highest, uintptr_t total, uintptr_t out, int threads) {
    const std::vector<RawRun> held = runs_of(runs);
    const RawAttend a = raw_attend(kind, kv_heads, dim, rows, q, softcap, held, null_scores);
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
                int64_t visible_to, uintptr_t bias, float softcap, int kind, const std::vector<int64_t> &runs,
                uintptr_t null_scores, uintptr_t out, int threads) {
    const Layout l = layout_of(numbers);
    const std::vector<RawRun> held = runs_of(runs);
    const LayerAttend a{over_records(l, page_q, rows, near, records, num_records, visible_from, visible_to, bias, softcap),
                        num_records, records_per_span,
                        raw_attend(kind, l.kv_heads, l.head_dim, rows, q, softcap, held, null_scores)};
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

// Many rows over float32 keys and values: ../attention.py has the shapes.
void attend_rows(uintptr_t q, uintptr_t k, uintptr_t v, int64_t kv_heads, int64_t rows, int64_t num_keys, int64_t dim, int64_t k_stride,
                 int64_t v_stride, uintptr_t mask, int64_t mask_rows, float softcap, uintptr_t highest, uintptr_t total, uintptr_t out,
                 int threads) {
    if (dim > 1024) throw std::invalid_argument("head_dim is above 1024");
    PrefillAttend a{kv_heads, dim, rows, num_keys, at<const float>(q), at<const float>(k), at<const float>(v), k_stride, v_stride,
                    at<const uint8_t>(mask), mask_rows, softcap, at<float>(highest), at<float>(total), at<float>(out), nullptr};
    nb::gil_scoped_release released;
    const Kernels &kernels = *active;
    // Kept from call to call: fresh pages of some megabytes cost a tenth of the whole.
    thread_local std::unique_ptr<float[]> packed;
    thread_local int64_t size = 0;
    constexpr int64_t LINE_FLOATS = 16;
    const int64_t wanted = kernels.prefill_floats(a) + LINE_FLOATS;
    if (wanted > size) {
        packed.reset();
        size = 0;  // should there be no room for more
        packed.reset(new float[(size_t)wanted]);
        size = wanted;
    }
    const uintptr_t from = reinterpret_cast<uintptr_t>(packed.get());
    a.packed = at<float>((from + 63) / 64 * 64);
    const int64_t blocks = (rows + PREFILL_ROWS - 1) / PREFILL_ROWS, bytes = kv_heads * rows * num_keys * 4;
    share_out(kernels.prefill_panels(a), 1, kv_heads * num_keys * dim * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.pack_panel(a, i);
    });
    take_turns(kv_heads * blocks, bytes, kernels.prefill_scratch(a), threads, [&](int64_t i, float *scratch) {
        const int64_t first = i % blocks * PREFILL_ROWS, left = rows - first;
        kernels.attend_block(a, i / blocks, first, left < PREFILL_ROWS ? left : PREFILL_ROWS, scratch);
    });
}

// Two partials of `rows` rows to the first.
void join_two(int64_t rows, int64_t dim, uintptr_t highest, uintptr_t total, uintptr_t out, uintptr_t part_highest, uintptr_t part_total,
              uintptr_t part_out, int threads) {
    nb::gil_scoped_release released;
    share_out(rows, 16, rows * dim * 8, threads, [&](int64_t begin, int64_t end) {
        active->join_two(end - begin, dim, at<float>(highest) + begin, at<float>(total) + begin, at<float>(out) + begin * dim,
                         at<float>(part_highest) + begin, at<float>(part_total) + begin, at<float>(part_out) + begin * dim);
    });
}

// A partial's out (kv_heads, groups * tokens, dim), divided by its total, to (tokens, kv_heads * groups * dim).
void finish_rows(uintptr_t total, uintptr_t out, int64_t heads, int64_t tokens, int64_t dim, uintptr_t to, int threads) {
    const float *totals = at<const float>(total), *from = at<const float>(out);
    float *all = at<float>(to);
    nb::gil_scoped_release released;
    share_out(tokens, 1, tokens * heads * dim * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t row = h * tokens + t;
                for (int64_t i = 0; i < dim; ++i) all[(t * heads + h) * dim + i] = from[row * dim + i] / totals[row];
            }
    });
}

// What turned key biases add to scores: ../rope_scores.py has the shapes.
void rope_scores(uintptr_t cosines, uintptr_t sines, uintptr_t constant, uintptr_t table, int64_t num_fast, int64_t rows, int64_t pairs,
                 int64_t start, int64_t count, uintptr_t out, int threads) {
    if (pairs > 512) throw std::invalid_argument("more than 512 pairs of elements are turned");
    const RopeScores a{rows, pairs, start, count, at<const float>(cosines), at<const float>(sines), at<const float>(constant),
                       num_fast, at<const float>(table), at<float>(out)};
    nb::gil_scoped_release released;
    share_out(count, TURN_BLOCK, rows * count * pairs, threads, [&](int64_t begin, int64_t end) { active->rope_scores(a, begin, end); });
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
    m.def("attend_rows", &attend_rows);
    m.def("join_two", &join_two);
    m.def("finish_rows", &finish_rows);
    m.def("rope_scores", &rope_scores);
    m.def("merge", &merge);
}
