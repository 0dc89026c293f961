// Attention of one token over one layer: spans of sealed pages wherever they lie in memory, then the raw tokens, one result. For
// C++ that does more of a layer than this (a whole decode step), and for bind_attend.cpp.
//
//     attend_layer(kernels, what, out, threads);           // all of it
//
//     std::vector<float> parts(part_floats(what));         // or in steps, by threads of one's own:
//     for i in 0 .. num_units(what) - 1: attend_unit(kernels, what, i, parts.data(), scratch);   in any order, by any thread
//     then join_rows(kernels, what, parts.data(), out, begin, end);                               any parts of all rows
//
// The result's bits depend neither on the number of threads nor on who takes what.
#pragma once
#include <atomic>
#include <cstddef>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace ebbtide {

struct LayerAttend {
    Attend pages;             // records of consecutive spans; not looked at where num_records is 0
    int64_t num_records;      // of the list pages.near, pages.records
    int64_t records_per_span;  // the last span may hold fewer
    RawAttend raw;

    int64_t num_spans() const { return (num_records + records_per_span - 1) / records_per_span; }
    int64_t num_rows() const { return raw.kv_heads * raw.rows; }
};

// A partial's parts for a number of partials, one after the other.
struct PartSpace {
    float *highest, *total, *out;
    PartSpace(float *all, int64_t count, int64_t rows) : highest(all), total(all + count * rows), out(total + count * rows) {}
};

inline int64_t part_floats(const LayerAttend &a) { return (a.num_spans() + 1) * a.num_rows() * (2 + a.raw.head_dim); }

inline int64_t num_units(const LayerAttend &a) { return (a.num_spans() + 1) * a.raw.kv_heads; }

// In floats, for any unit.
inline int64_t unit_scratch(const Kernels &kernels, const LayerAttend &a) {
    const int64_t raw = kernels.raw_scratch(a.raw);
    const int64_t pages = a.num_records ? kernels.attend_scratch(a.pages.layout, a.pages.rows) : 0;
    return raw > pages ? raw : pages;
}

// One head of a span (the last ones: of the raw tokens) to its partial.
inline void attend_unit(const Kernels &kernels, const LayerAttend &a, int64_t unit, float *parts, float *scratch) {
    const int64_t span = unit / a.raw.kv_heads, head = unit % a.raw.kv_heads, row = unit * a.raw.rows;
    const PartSpace space(parts, a.num_spans() + 1, a.num_rows());
    float *highest = space.highest + row, *total = space.total + row, *out = space.out + row * a.raw.head_dim;
    if (span == a.num_spans()) return kernels.attend_raw(a.raw, head, scratch, highest, total, out);
    const int64_t first = span * a.records_per_span, left = a.num_records - first;
    kernels.attend_span(a.pages, head, first, left < a.records_per_span ? left : a.records_per_span, scratch, highest, total, out);
}

// Rows begin .. end of the result (kv_heads * rows, head_dim), once all units are done.
inline void join_rows(const Kernels &kernels, const LayerAttend &a, float *parts, float *out, int64_t begin, int64_t end) {
    const PartSpace space(parts, a.num_spans() + 1, a.num_rows());
    kernels.join_spans(a.num_spans() + 1, a.num_spans(), a.num_rows(), a.raw.head_dim, space.highest, space.total, space.out, out,
                       begin, end);
}

// run(i, scratch) for i in 0 .. num_units - 1: whoever is free takes the next.
template <typename Run>
inline void take_turns(int64_t num_units, int64_t bytes, int64_t scratch_floats, int threads, const Run &run) {
    std::atomic<int64_t> next{0};
    share_out(threads < num_units ? threads : num_units, 1, bytes, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch((std::size_t)scratch_floats);
        // Without sharing one call stands for all.
        (void)begin, (void)end;
        for (int64_t i = next++; i < num_units; i = next++) run(i, scratch.data());
    });
}

// The result, (kv_heads * rows, head_dim) floats.
inline void attend_layer(const Kernels &kernels, const LayerAttend &a, float *out, int threads) {
    std::vector<float> parts((std::size_t)part_floats(a));
    int64_t bytes = a.num_records ? a.num_records * a.pages.layout.record_bytes : 0;
    for (int64_t i = 0; i < a.raw.num_runs; ++i) bytes += 4 * a.raw.runs[i].tokens * a.raw.kv_heads * a.raw.head_dim;
    take_turns(num_units(a), bytes, unit_scratch(kernels, a), threads,
               [&](int64_t i, float *scratch) { attend_unit(kernels, a, i, parts.data(), scratch); });
    share_out(a.num_rows(), 1, part_floats(a) * 4, threads,
              [&](int64_t begin, int64_t end) { join_rows(kernels, a, parts.data(), out, begin, end); });
}

}  // namespace ebbtide
