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

constexpr int INTERFACE = 1;  // ../dispatch.py asks for the same number
constexpr int64_t MAX_HEAD_DIM = 1024;

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
    if (numbers.size() != LAYOUT_NUMBERS) throw std::invalid_argument("a layout has 17 numbers");
    Layout layout;
    std::memcpy(&layout, numbers.data(), sizeof layout);
    if (layout.head_dim > MAX_HEAD_DIM) throw std::invalid_argument("head_dim is above 1024");
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
}
