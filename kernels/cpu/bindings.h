// What the files that offer kernels to Python share. Tensors come as addresses: crossing by DLPack costs 2 microseconds
// for each, and a decode step makes hundreds of calls.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace ebbtide {

extern const Kernels *active;  // the instruction set in use

template <typename T>
T *at(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

// Numbers and addresses in the order in which Python gives them.
struct Reader {
    const std::vector<int64_t> &numbers;
    size_t next = 0;

    int64_t number() {
        if (next >= numbers.size()) throw std::invalid_argument("these are not a layer's numbers");
        return numbers[next++];
    }
    template <typename T>
    T *address() {
        return at<T>((uintptr_t)number());
    }
};

// As ../norm.py's norm_numbers gives it.
inline Norm read_norm(Reader &reader, const double *floats) {
    Norm norm;
    norm.weight = reader.address<const float>();
    norm.bias = reader.address<const float>();
    norm.takes_mean = reader.number() != 0;
    norm.offset = (float)floats[0];
    norm.eps = (float)floats[1];
    return norm;
}

// What dispatch.layout_numbers gives.
inline Layout layout_of(const std::vector<int64_t> &numbers) {
    constexpr int64_t MOST = 1024;
    if (numbers.size() != LAYOUT_NUMBERS) throw std::invalid_argument("this is not a layout");
    Layout layout;
    std::memcpy(&layout, numbers.data(), sizeof layout);
    if (layout.head_dim > MOST || layout.page_tokens > MOST || layout.pages_per_record > MOST)
        throw std::invalid_argument("head_dim, page_tokens or pages_per_record is above 1024");
    return layout;
}

// Runs of raw tokens: keys, values, bytes from head to head, tokens of each.
inline std::vector<RawRun> runs_of(const std::vector<int64_t> &numbers) {
    if (numbers.size() % 4 || numbers.size() / 4 > MAX_RUNS) throw std::invalid_argument("these are not runs");
    std::vector<RawRun> runs;
    for (size_t i = 0; i < numbers.size(); i += 4)
        runs.push_back({at<const uint8_t>((uintptr_t)numbers[i]), at<const uint8_t>((uintptr_t)numbers[i + 1]), numbers[i + 2],
                        numbers[i + 3]});
    return runs;
}

// Raw tokens as ../layer_attention.py gives them; `runs` must outlive the result.
inline RawAttend raw_attend(int kind, int64_t kv_heads, int64_t dim, int64_t rows, uintptr_t q, float softcap,
                            const std::vector<RawRun> &runs, uintptr_t null_scores) {
    return {(RawKind)kind, kv_heads, dim, rows, at<const float>(q), softcap, runs.data(), (int64_t)runs.size(),
            at<const float>(null_scores)};
}

void bind_attend(nanobind::module_ &m);
void bind_matmul(nanobind::module_ &m);
void bind_reads(nanobind::module_ &m);
void bind_recurrence(nanobind::module_ &m);
void bind_rows(nanobind::module_ &m);
void bind_select(nanobind::module_ &m);
void bind_step(nanobind::module_ &m);

}  // namespace ebbtide
