// The Python module ebbtide.kernels._cpu: the choice of instruction set, and the kernels that have no file of their own.
// Nothing is checked again here but what would run past a buffer of ours.
#include <atomic>
#include <string>

#include "bindings.h"
#include "processor.h"

namespace nb = nanobind;
using namespace ebbtide;

namespace {

constexpr int INTERFACE = 38;  // ../dispatch.py asks for the same number

// The instruction sets that this machine has, best first.
std::vector<const Kernels *> available() {
    std::vector<const Kernels *> sets;
#if defined(EBBTIDE_X86)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(EBBTIDE_AMX)
    if (vnni && has_amx()) sets.push_back(&kernels_amx());
#endif
    if (vnni) sets.push_back(&kernels_avx512vnni());
    if (avx512) sets.push_back(&kernels_avx512());
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#if defined(EBBTIDE_AVXVNNI)
    if (avx2 && has_avxvnni()) sets.push_back(&kernels_avxvnni());
#endif
    if (avx2) sets.push_back(&kernels_avx2());
#endif
#if defined(EBBTIDE_AARCH64)
    if (has_neon_dot()) sets.push_back(&kernels_neon_dot());
    sets.push_back(&kernels_neon());
#endif
    sets.push_back(&kernels_portable());
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

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "Ebbtide's CPU kernels. Called through ebbtide.kernels.dispatch alone: arguments are addresses.";
    m.attr("INTERFACE") = INTERFACE;
    m.def("instruction_sets", &instruction_sets, "What this machine can run, best first.");
    m.def("instruction_set", [] { return std::string(active->name); }, "What is in use.");
    m.def("byte_products", [] { return active->byte_products; }, "Whether codes are multiplied faster than floats by many rows.");
    m.def("use_instruction_set", &use_instruction_set, "For tests and benchmarks.");
    m.def("unpack", &unpack);
    m.def("seal", &seal, "False when a number is not finite or float16 cannot hold a parameter.");
    bind_matmul(m);
    bind_step(m);
    bind_attend(m);
    bind_select(m);
    bind_reads(m);
    bind_recurrence(m);
    bind_rows(m);
}
