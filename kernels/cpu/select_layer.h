// Attention of one token over a layer of which only some records are read: what stands before the choice, the choice, and what
// is left out. ../selection.py offers the steps one by one, token_step.h takes them for all layers in one call: bits are the same.
//
// Which records are read is a function of the query and the pages alone; no result depends on the number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attend_layer.h"

namespace ebbtide {

// The raw tokens of a step, and what is known of the layer besides: see ../effect.py.
struct Standing {
    RawAttend raw;
    const float *output_norms;  // (kv_heads, rows)
    const float *x;             // (hidden), what enters the layer
    int64_t hidden;

    int64_t num_rows() const { return raw.kv_heads * raw.rows; }
};

// Their partial, highest[rows], total[rows], out[rows][dim], its log mass, and each row's effect.
inline void stand(const Kernels &kernels, const Standing &s, float *highest, float *total, float *out, float *log_mass, float *effect,
                  int threads) {
    const RawAttend &raw = s.raw;
    const int64_t all = s.num_rows(), dim = raw.head_dim;
    int64_t tokens = 0;
    for (int64_t i = 0; i < raw.num_runs; ++i) tokens += raw.runs[i].tokens;
    std::vector<float> spread((std::size_t)raw.kv_heads);
    take_turns(raw.kv_heads, 4 * tokens * raw.kv_heads * dim, kernels.raw_scratch(raw), threads, [&](int64_t head, float *scratch) {
        const int64_t row = head * raw.rows;
        kernels.attend_raw(raw, head, scratch, highest + row, total + row, out + row * dim);
        spread[(std::size_t)head] = kernels.value_spread(raw, head, scratch);
    });
    double added = 0;
    for (int64_t r = 0; r < all; ++r) {
        log_mass[r] = highest[r] + std::log(total[r]);
        double square = 0;
        for (int64_t j = raw.value_first; j < dim; ++j) square += (double)out[r * dim + j] * out[r * dim + j];
        const double norm = s.output_norms[r] / total[r];
        added += norm * norm * square;
    }
    for (int64_t i = 0; i < s.hidden; ++i) added += (double)s.x[i] * s.x[i];
    const double size = std::sqrt(added);
    for (int64_t r = 0; r < all; ++r)
        effect[r] = size > 0 ? (float)(s.output_norms[r] * (double)spread[(std::size_t)(r / raw.rows)] / size) : 0.0f;
}

// (kv_heads, rows, head_dim) with zeros behind each row, up to sixteens.
inline std::vector<float> padded_queries(const Layout &l, int64_t rows, const float *q) {
    const int64_t dim = l.head_dim, wide = (dim + 15) / 16 * 16, all = l.kv_heads * rows;
    std::vector<float> padded((std::size_t)(all * wide));
    for (int64_t r = 0; r < all; ++r) std::memcpy(padded.data() + r * wide, q + r * dim, (std::size_t)dim * 4);
    return padded;
}

// The estimate of every page. q: (kv_heads, rows, head_dim); s.q is not looked at.
inline void score_all(const Kernels &kernels, Score s, const float *q, int64_t num_records, int threads) {
    const Layout &l = s.layout;
    const std::vector<float> padded = padded_queries(l, s.rows, q);
    s.q = padded.data();
    share_out(num_records, 1, num_records * l.near_record_bytes, threads, [&](int64_t begin, int64_t end) {
        constexpr uintptr_t LINE = 64;  // loads that cross cache lines cost a tenth of the whole
        std::vector<uint8_t> scratch((std::size_t)kernels.score_scratch(l) + LINE);
        const uintptr_t from = reinterpret_cast<uintptr_t>(scratch.data());
        uint8_t *aligned = reinterpret_cast<uint8_t *>((from + LINE - 1) / LINE * LINE);
        for (int64_t i = begin; i < end; ++i) kernels.score_record(s, i, aligned);
    });
}

inline void bound_all(const Kernels &kernels, Bounds b, const float *q, int64_t num_records, int threads) {
    const std::vector<float> padded = padded_queries(b.layout, b.rows, q);
    b.q = padded.data();
    share_out(num_records, 1, num_records * b.layout.near_record_bytes, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.bound_record(b, i);
    });
}

inline void share_all(const Kernels &kernels, const Shares &s, int64_t rows, int threads) {
    share_out(rows, 1, rows * s.num_pages * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) kernels.page_shares(s, r);
    });
}

// The fewest records, costliest first, that keep what all rows get wrong, in quadrature, within epsilon; to ranked. Ties go to
// the lowest number; records that cost nothing are never taken.
inline int64_t choose_records(const Kernels &kernels, const Costs &c, double epsilon, int64_t *ranked, int threads) {
    const int64_t records = c.num_pages / c.pages_per_record;
    std::vector<float> costs((std::size_t)(records * c.rows));
    constexpr int64_t LINE_FLOATS = 16;  // of neighbouring rows; threads that wrote to one line would wait for each other
    share_out(c.rows, LINE_FLOATS, c.rows * c.num_pages * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) kernels.record_costs(c, r, costs.data());
    });
    // In double precision: what is left is all but what was taken, down to a millionth of it.
    std::vector<double> left((std::size_t)c.rows), worth((std::size_t)records);
    std::vector<int64_t> heap;
    for (int64_t i = 0; i < records; ++i) {
        const float *of_record = costs.data() + i * c.rows;
        double together = 0;
        for (int64_t r = 0; r < c.rows; ++r) {
            left[(std::size_t)r] += of_record[r];
            together += of_record[r];
        }
        worth[(std::size_t)i] = together;
        if (together > 0) heap.push_back(i);
    }
    const auto is_less = [&](int64_t a, int64_t b) {
        const double of_a = worth[(std::size_t)a], of_b = worth[(std::size_t)b];
        return of_a < of_b || (of_a == of_b && a > b);
    };
    std::make_heap(heap.begin(), heap.end(), is_less);
    int64_t count = 0;
    while (!heap.empty()) {
        double wrong = 0;
        for (const double one : left) wrong += one * one;
        if ((float)std::sqrt(wrong) <= (float)epsilon) break;  // so that sums of shares may equal it
        std::pop_heap(heap.begin(), heap.end(), is_less);
        const int64_t taken = ranked[count++] = heap.back();
        heap.pop_back();
        for (int64_t r = 0; r < c.rows; ++r) left[(std::size_t)r] -= costs[(std::size_t)(taken * c.rows + r)];
    }
    return count;
}

// What is left out, and its mean values' sum, to out (kv_heads, rows, head_dim). m.weights is not looked at.
inline void attend_left_out(const Kernels &kernels, const LeftOut &l, Means m, float *out, int threads) {
    const int64_t heads = m.layout.kv_heads, dim = m.layout.head_dim, all = heads * m.rows;
    share_out(all, 1, all * m.num_pages * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) kernels.leave_out(l, r);
    });
    m.weights = l.shares;
    const int64_t records = m.num_pages / m.layout.pages_per_record, chunks = (records + MEANS_RECORDS - 1) / MEANS_RECORDS;
    std::vector<float> sums((std::size_t)(chunks * all * dim));
    take_turns(chunks * heads, m.num_pages * heads * dim * 2, kernels.means_scratch(m.layout, m.rows), threads, [&](int64_t i, float *scratch) {
        kernels.sum_means(m, i % heads, i / heads, scratch, sums.data() + i * m.rows * dim);
    });
    std::memset(out, 0, (std::size_t)(all * dim) * 4);
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t j = 0; j < all * dim; ++j) out[j] += sums[(std::size_t)(c * all * dim + j)];
}

// One partial for each head and record, of some records of a list: positions[count] in it, or, with null, the first ones. Rows of
// highest, total and out are the whole list's, record by record.
inline void attend_each(const Kernels &kernels, const Attend &a, const int64_t *positions, int64_t count, float *highest, float *total, float *out,
                        int threads) {
    const Layout &l = a.layout;
    take_turns(count * l.kv_heads, count * l.record_bytes, kernels.attend_scratch(l, a.rows), threads, [&](int64_t i, float *scratch) {
        const int64_t head = i % l.kv_heads, record = positions ? positions[i / l.kv_heads] : i / l.kv_heads;
        const int64_t part = (record * l.kv_heads + head) * a.rows;
        kernels.attend_chunk(a, head, record, scratch, highest + part, total + part, out + part * l.head_dim);
    });
}

// How records are chosen: see ../../prefetch/top_p.py.
struct Selection {
    double epsilon;
    bool by_unevenness, by_effect;
};

struct SelectLayer {
    Standing standing;
    Attend pages;  // all records of the layer; visible_from and visible_to are not looked at
    int64_t num_records, skip_first;  // tokens of the first record that are passed over, being raw

    int64_t num_pages() const { return num_records * pages.layout.pages_per_record; }
    int64_t record_tokens() const { return pages.layout.pages_per_record * pages.layout.page_tokens; }
};

// One layer's selection, step by step: choose, then estimate, and attend to the records in whatever parts they come in, then
// finish. What it is given must stay until then. Memory grows to the largest layer.
class LayerSelection {
public:
    std::vector<int64_t> chosen;  // ascending

    void choose(const Kernels &kernels, const SelectLayer &a, const Selection &how, int threads) {
        const Layout &l = a.pages.layout;
        const int64_t all = a.standing.num_rows(), pages = a.num_pages();
        for (std::vector<float> *one :
             {&missed_, &misplaced_, &log_total_, &whole_log_, &raw_log_mass_, &effect_, &raw_highest_, &raw_total_, &total_})
            grow(*one, all);
        for (std::vector<float> *one : {&log_mass_, &unevenness_, &shares_}) grow(*one, all * pages);
        grow(raw_out_, all * l.head_dim);
        stand(kernels, a.standing, raw_highest_.data(), raw_total_.data(), raw_out_.data(), raw_log_mass_.data(), effect_.data(), threads);
        const Score score{l, a.pages.rows, pages * l.page_tokens, pages, nullptr, a.pages.bias, a.pages.softcap, a.pages.near,
                          log_mass_.data(), unevenness_.data()};
        score_all(kernels, score, a.pages.q, a.num_records, threads);
        for (int64_t r = 0; r < all; ++r) log_mass_[(std::size_t)(r * pages)] = -INFINITY;  // the sink, which is attended raw
        share_all(kernels, {pages, log_mass_.data(), raw_log_mass_.data(), shares_.data(), log_total_.data()}, all, threads);
        const Costs costs{all, pages, l.pages_per_record, shares_.data(), how.by_unevenness ? unevenness_.data() : nullptr,
                          how.by_effect ? effect_.data() : nullptr};
        chosen.resize((std::size_t)a.num_records);
        chosen.resize((std::size_t)choose_records(kernels, costs, how.epsilon, chosen.data(), threads));
        std::sort(chosen.begin(), chosen.end());
    }

    // Attends to what is left out, and makes ready for the chosen records.
    void estimate(const Kernels &kernels, const SelectLayer &a, int threads) {
        const Layout &l = a.pages.layout;
        const int64_t all = a.standing.num_rows(), dim = l.head_dim, num = (int64_t)chosen.size();
        grow(parts_, (num + 2) * all * (2 + dim));
        const PartSpace space = parts(a);
        const int64_t estimate = num * all, raw = estimate + all;
        const LeftOut left{a.num_pages(), l.pages_per_record, num, chosen.data(), shares_.data(), unevenness_.data(), missed_.data(),
                           misplaced_.data()};
        attend_left_out(kernels, left, {l, a.pages.rows, a.num_pages(), nullptr, a.pages.near}, space.out + estimate * dim, threads);
        std::memcpy(space.highest + estimate, log_total_.data(), (std::size_t)all * 4);
        std::memcpy(space.total + estimate, missed_.data(), (std::size_t)all * 4);
        std::memcpy(space.highest + raw, raw_highest_.data(), (std::size_t)all * 4);
        std::memcpy(space.total + raw, raw_total_.data(), (std::size_t)all * 4);
        std::memcpy(space.out + raw * dim, raw_out_.data(), (std::size_t)(all * dim) * 4);
        near_ = picked(a.pages.near);
        records_.assign((std::size_t)num, nullptr);  // what is not there is not asked for ahead
        if (a.pages.bias) pick_bias(a);
    }

    // Attends to some of the chosen records: positions[count] among them, or, with null, the first ones. records: where each
    // of these lies.
    void attend(const Kernels &kernels, const SelectLayer &a, const int64_t *positions, int64_t count, const uint8_t *const *records,
                int threads) {
        for (int64_t i = 0; i < count; ++i) records_[(std::size_t)(positions ? positions[i] : i)] = records[i];
        const PartSpace space = parts(a);
        Attend some = a.pages;
        some.num_tokens = some.visible_to = (int64_t)chosen.size() * a.record_tokens();
        some.visible_from = !chosen.empty() && chosen[0] == 0 ? a.skip_first : 0;
        some.bias = a.pages.bias ? bias_.data() : nullptr;
        some.near = near_.data();
        some.records = records_.data();
        attend_each(kernels, some, positions, count, space.highest, space.total, space.out, threads);
    }

    // The attention output of all rows, (kv_heads * rows, head_dim), once everything was attended to.
    void finish(const Kernels &kernels, const SelectLayer &a, float *out, int threads) {
        const int64_t all = a.standing.num_rows(), dim = a.pages.layout.head_dim, count = (int64_t)chosen.size() + 2;
        const PartSpace space = parts(a);
        share_out(all, 1, count * all * dim * 4, threads, [&](int64_t begin, int64_t end) {
            kernels.merge_chunks(count, all, dim, space.highest, space.total, space.out, whole_log_.data(), total_.data(), out, begin, end);
        });
        for (int64_t r = 0; r < all; ++r) {
            const float total = total_[(std::size_t)r];
            for (int64_t j = 0; j < dim; ++j) out[r * dim + j] /= total;
            whole_log_[(std::size_t)r] += std::log(total);
            const float scale = of_whole(r);
            missed_[(std::size_t)r] *= scale;
            misplaced_[(std::size_t)r] *= scale;
        }
    }

    // After `choose`: the log mass of the raw tokens, and each row's effect.
    void known(int64_t rows, float *raw_log_mass, float *effect) const {
        std::memcpy(raw_log_mass, raw_log_mass_.data(), (std::size_t)rows * 4);
        std::memcpy(effect, effect_.data(), (std::size_t)rows * 4);
    }

    // After `finish`: pages' shares of all mass as it is known in the end, (rows, pages), and its log.
    void left_out(int64_t rows, int64_t pages, float *to_shares, float *to_log_total) const {
        std::memcpy(to_log_total, whole_log_.data(), (std::size_t)rows * 4);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t p = 0; p < pages; ++p) to_shares[r * pages + p] = shares_[(std::size_t)(r * pages + p)] * of_whole(r);
    }

    // The mean and the greatest missed share of `rows` rows, and the same of misplaced ones.
    void figures(int64_t rows, double *to) const {
        to[0] = to[1] = to[2] = to[3] = 0;
        for (std::size_t r = 0; r < (std::size_t)rows; ++r) {
            to[0] += missed_[r] / (double)rows;
            to[1] = missed_[r] > to[1] ? missed_[r] : to[1];
            to[2] += misplaced_[r] / (double)rows;
            to[3] = misplaced_[r] > to[3] ? misplaced_[r] : to[3];
        }
    }

private:
    // A row's shares times this are shares of all mass as it is known in the end.
    float of_whole(int64_t row) const { return std::exp(log_total_[(std::size_t)row] - whole_log_[(std::size_t)row]); }

    static void grow(std::vector<float> &v, int64_t n) {
        if ((int64_t)v.size() < n) v.resize((std::size_t)n);
    }

    // Partials of the chosen records in their order, of what is left out, and of the raw tokens.
    PartSpace parts(const SelectLayer &a) { return PartSpace(parts_.data(), (int64_t)chosen.size() + 2, a.standing.num_rows()); }

    std::vector<const uint8_t *> picked(const uint8_t *const *of_all) const {
        std::vector<const uint8_t *> found;
        for (const int64_t record : chosen) found.push_back(of_all[record]);
        return found;
    }

    // What the key bias adds to the scores of the chosen records, (kv_heads * rows, their tokens).
    void pick_bias(const SelectLayer &a) {
        const int64_t each = a.record_tokens(), all = a.standing.num_rows(), count = (int64_t)chosen.size();
        grow(bias_, all * count * each);
        for (int64_t r = 0; r < all; ++r)
            for (int64_t i = 0; i < count; ++i)
                std::memcpy(bias_.data() + (r * count + i) * each, a.pages.bias + (r * a.num_records + chosen[(std::size_t)i]) * each,
                            (std::size_t)each * 4);
    }

    std::vector<float> missed_, misplaced_;      // of each row; in the end as shares of all mass
    std::vector<float> log_total_, whole_log_;  // the log of all mass, before chosen records were attended and after
    std::vector<float> shares_;                 // (rows, num_pages) in units of log_total, 0 for chosen records
    std::vector<float> log_mass_, unevenness_, raw_log_mass_, effect_, raw_highest_, raw_total_, raw_out_, total_, parts_;
    // Of the chosen records, in their order: what the key bias adds, and where their near records and they lie.
    std::vector<float> bias_;
    std::vector<const uint8_t *> near_, records_;
};

}  // namespace ebbtide
