// The Python module ebbtide.kernels._cpu. Tensors come as addresses: crossing by DLPack costs 2 microseconds for each
// tensor, and a decode step makes hundreds of calls. ../dispatch.py's callers have checked device, dtype, shape
// and contiguity; nothing is checked again here but what would run past a buffer of ours.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;
using namespace ebbtide;

namespace {

constexpr int INTERFACE = 5;  // ../dispatch.py asks for the same number
constexpr int64_t MAX_HEAD_DIM = 1024;
constexpr int64_t MAX_PAGE_TOKENS = 1024;

// The instruction sets that this machine has, best first.
std::vector<const Kernels *> available() {
    std::vector<const Kernels *> sets;
#if defined(EBBTIDE_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
        sets.push_back(&kernels_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        sets.push_back(&kernels_avx2());
#endif
    sets.push_back(&kernels_portable());
    return sets;
}

const Kernels *active = available().front();

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

Layout layout_of(const std::vector<int64_t> &numbers) {
    if (numbers.size() != LAYOUT_NUMBERS) throw std::invalid_argument("this is not a layout");
    Layout layout;
    std::memcpy(&layout, numbers.data(), sizeof layout);
    if (layout.head_dim > MAX_HEAD_DIM || layout.page_tokens > MAX_PAGE_TOKENS)
        throw std::invalid_argument("head_dim or page_tokens is above 1024");
    return layout;
}

template <typename T>
T *at(uintptr_t address) {
    return reinterpret_cast<T *>(address);
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

void matvec(int kind, uintptr_t x, uintptr_t weight, uintptr_t scales, int64_t in, int64_t out_features,
            uintptr_t out, int threads) {
    static constexpr double BYTES[] = {4, 2, 2, 1.0625, 0.5625};
    const MatVec m{(WeightKind)kind, in, at<const float>(x), at<const void>(weight), at<const uint16_t>(scales),
                   at<float>(out)};
    nb::gil_scoped_release released;
    share_out(out_features, 1, (int64_t)(BYTES[kind] * (double)(in * out_features)), threads,
              [&](int64_t begin, int64_t end) { active->matvec(m, begin, end); });
}

void attend(uintptr_t q, int64_t rows, uintptr_t near, uintptr_t records, const std::vector<int64_t> &numbers,
            int64_t num_records, int64_t visible_from, int64_t visible_to, uintptr_t bias, float softcap,
            uintptr_t highest, uintptr_t total, uintptr_t out, int threads) {
    const Layout l = layout_of(numbers);
    const int64_t tokens = l.pages_per_record * l.page_tokens;
    const Attend a{l, rows, num_records * tokens, visible_from, visible_to, at<const float>(q),
                   at<const float>(bias), softcap, at<const uint8_t>(near), at<const uint8_t>(records)};
    nb::gil_scoped_release released;
    const int64_t per_chunk = rows * (2 + l.head_dim), chunks = l.kv_heads * num_records;
    std::vector<float> parts((size_t)(chunks * per_chunk));
    float *tops = parts.data(), *totals = tops + chunks * rows, *outs = totals + chunks * rows;
    share_out(chunks, 1, chunks * l.record_bytes, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch((size_t)active->attend_scratch(l, rows));
        for (int64_t i = begin; i < end; ++i)
            active->attend_chunk(a, i / num_records, i % num_records, scratch.data(), tops + i * rows,
                                 totals + i * rows, outs + i * rows * l.head_dim);
    });
    for (int64_t head = 0; head < l.kv_heads; ++head)
        active->merge_chunks(num_records, rows, l.head_dim, tops + head * num_records * rows,
                             totals + head * num_records * rows, outs + head * num_records * rows * l.head_dim,
                             at<float>(highest) + head * rows, at<float>(total) + head * rows,
                             at<float>(out) + head * rows * l.head_dim);
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
        std::vector<uint8_t> scratch((size_t)active->score_scratch(l, rows));
        for (int64_t i = begin; i < end; ++i) active->score_record(s, i, scratch.data());
    });
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "Ebbtide's CPU kernels. Called through ebbtide.kernels.dispatch alone: arguments are addresses.";
    m.attr("INTERFACE") = INTERFACE;
    m.def("instruction_sets", &instruction_sets, "What this machine can run, best first.");
    m.def("instruction_set", [] { return std::string(active->name); }, "What is in use.");
    m.def("use_instruction_set", &use_instruction_set, "For tests and benchmarks.");
    m.def("unpack", &unpack);
    m.def("seal", &seal, "False when a number is not finite or float16 cannot hold a parameter.");
    m.def("matvec", &matvec);
    m.def("attend", &attend);
    m.def("score", &score);
}
