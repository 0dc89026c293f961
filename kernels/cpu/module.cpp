// The Python module ebbtide.kernels._cpu: the choice of instruction set, and the kernels that have no file of their own.
// Nothing is checked again here but what would run past a buffer of ours.
#include <atomic>
#include <string>

#include "bindings.h"

namespace nb = nanobind;
using namespace ebbtide;

namespace {

constexpr int INTERFACE = 17;  // ../dispatch.py asks for the same number

// The instruction sets that this machine has, best first.
std::vector<const Kernels *> available() {
    std::vector<const Kernels *> sets;
#if defined(EBBTIDE_X86)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) sets.push_back(&kernels_avx512vnni());
    if (avx512) sets.push_back(&kernels_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        sets.push_back(&kernels_avx2());
#endif
    sets.push_back(&kernels_portable());
#if defined(EBBTIDE_AARCH64)
    sets.push_back(&kernels_neon());  // last, and so by choice alone: it has run in emulation only
#endif
    return sets;
}

}  // namespace

const Kernels *ebbtide::active = available().front();

namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels *set : available()) names.push_back(set->name);
    return names;
}

void use_instruction_set(const std::string &name) {
    for (const Kernels *set : available())
        if (name == set->name) {
            active = set;
            return;
        }
    throw std::invalid_argument("this machine has no instruction set named " + name);
}

void unpack(uintptr_t near, uintptr_t records, const std::vector<int64_t> &numbers, int64_t num_records,
            uintptr_t out_k, int64_t k_stride, uintptr_t out_v, int64_t v_stride, int threads) {
    const Layout l = layout_of(numbers);
    const int64_t blocks = num_records * l.blocks_per_record();
    nb::gil_scoped_release released;
    share_out(blocks, 1, blocks * l.page_tokens * l.head_dim * 8, threads, [&](int64_t begin, int64_t end) {
        active->unpack(l, at<const uint8_t>(near), at<const uint8_t>(records), at<float>(out_k), k_stride,
                       at<float>(out_v), v_stride, begin, end);
    });
}

bool seal(uintptr_t k, uintptr_t v, const std::vector<int64_t> &numbers, int64_t num_records, uintptr_t near,
          uintptr_t records, int threads) {
    const Layout l = layout_of(numbers);
    const int64_t blocks = num_records * l.blocks_per_record();
    std::atomic<bool> good{true};
    nb::gil_scoped_release released;
    share_out(blocks, 1, blocks * l.page_tokens * l.head_dim * 8, threads, [&](int64_t begin, int64_t end) {
        if (!active->seal(l, at<const float>(k), at<const float>(v), at<uint8_t>(near), at<uint8_t>(records),
                          begin, end))
            good = false;
    });
    return good;
}

void merge_all(int64_t chunks, int64_t rows, int64_t dim, const float *highest, const float *total, const float *out,
               float *to_highest, float *to_total, float *to_out, int threads) {
    share_out(rows, 1, chunks * rows * dim * 4, threads, [&](int64_t begin, int64_t end) {
        active->merge_chunks(chunks, rows, dim, highest, total, out, to_highest, to_total, to_out, begin, end);
    });
}

void score(uintptr_t q, int64_t rows, uintptr_t near, const std::vector<int64_t> &numbers, int64_t num_records,
           uintptr_t bias, float softcap, uintptr_t log_mass, uintptr_t unevenness, int threads) {
    const Layout l = layout_of(numbers);
    const int64_t dim = l.head_dim, wide = (dim + 15) / 16 * 16;
    nb::gil_scoped_release released;
    std::vector<float> padded((size_t)(l.kv_heads * rows * wide));
    for (int64_t i = 0; i < l.kv_heads * rows; ++i)
        std::memcpy(padded.data() + i * wide, at<const float>(q) + i * dim, (size_t)dim * 4);
    const int64_t num_pages = num_records * l.pages_per_record;
    const Score s{l, rows, num_pages * l.page_tokens, num_pages, padded.data(), at<const float>(bias), softcap,
                  at<const uint8_t *const>(near), at<float>(log_mass), at<float>(unevenness)};
    share_out(num_records, 1, num_records * l.near_record_bytes, threads, [&](int64_t begin, int64_t end) {
        constexpr uintptr_t LINE = 64;  // loads that cross cache lines cost a tenth of the whole
        std::vector<uint8_t> scratch((size_t)active->score_scratch(l) + LINE);
        uint8_t *aligned = at<uint8_t>((reinterpret_cast<uintptr_t>(scratch.data()) + LINE - 1) / LINE * LINE);
        for (int64_t i = begin; i < end; ++i) active->score_record(s, i, aligned);
    });
}

// near is an array of addresses, one for each record.
void attend_means(uintptr_t log_mass, int64_t rows, uintptr_t near, const std::vector<int64_t> &numbers,
                  int64_t num_records, uintptr_t highest, uintptr_t total, uintptr_t out, int threads) {
    const Layout l = layout_of(numbers);
    const Means m{l, rows, num_records * l.pages_per_record, at<const float>(log_mass), at<const uint8_t *const>(near)};
    nb::gil_scoped_release released;
    const int64_t chunks = (num_records + MEANS_RECORDS - 1) / MEANS_RECORDS, all_rows = l.kv_heads * rows;
    const int64_t count = chunks * all_rows;
    std::vector<float> parts((size_t)(count * (2 + l.head_dim)));
    float *tops = parts.data(), *totals = tops + count, *outs = totals + count;
    share_out(chunks * l.kv_heads, 1, m.num_pages * l.kv_heads * l.head_dim * 2, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch((size_t)active->means_scratch(l, rows));
        for (int64_t i = begin; i < end; ++i)
            active->attend_means_chunk(m, i % l.kv_heads, i / l.kv_heads, scratch.data(), tops + i * rows,
                                       totals + i * rows, outs + i * rows * l.head_dim);
    });
    merge_all(chunks, all_rows, l.head_dim, tops, totals, outs, at<float>(highest), at<float>(total), at<float>(out),
              threads);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "Ebbtide's CPU kernels. Called through ebbtide.kernels.dispatch alone: arguments are addresses.";
    m.attr("INTERFACE") = INTERFACE;
    m.def("instruction_sets", &instruction_sets, "What this machine can run, best first; what no machine of ours has run comes last.");
    m.def("instruction_set", [] { return std::string(active->name); }, "What is in use.");
    m.def("use_instruction_set", &use_instruction_set, "For tests and benchmarks.");
    m.def("unpack", &unpack);
    m.def("seal", &seal, "False when a number is not finite or float16 cannot hold a parameter.");
    bind_matmul(m);
    bind_step(m);
    m.def("score", &score);
    m.def("attend_means", &attend_means);
    bind_attend(m);
    bind_reads(m);
}
