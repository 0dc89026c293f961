// Products of heads, each by outputs of its own: for ../matmul.py's linear_heads, and for a layer's step.
#pragma once
#include <vector>

#include "bindings.h"

namespace ebbtide {

// Rows of heads, (rows, heads, n) floats, so many apart.
template <typename Float>
struct HeadRows {
    Float *first;
    int64_t row_stride, head_stride;
};

// The heads' outputs are m's in turn. to: its rows must lie as many floats apart as m has outputs, or be one.
inline void multiply_each_head(const Matrix &m, int64_t heads, int64_t rows, const HeadRows<const float> &x, const HeadRows<float> &to,
                           int threads) {
    constexpr uintptr_t LINE = 64;
    const int64_t each = m.out / heads, of_head = takes_bytes(m.kind) ? rows * row_bytes(m.in) : 0;
    std::vector<uint8_t> bytes((size_t)(heads * of_head) + LINE);
    uint8_t *aligned = at<uint8_t>((reinterpret_cast<uintptr_t>(bytes.data()) + LINE - 1) / LINE * LINE);
    share_out(heads, 1, weight_bytes(m) * rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
            Rows given{rows, x.first + head * x.head_stride, x.row_stride, nullptr};
            if (of_head) {
                active->quantise_rows(given.x, m.in, x.row_stride, aligned + head * of_head, 0, rows);
                given.bytes = aligned + head * of_head;
            }
            float *out = to.first + head * (to.head_stride - each);  // outputs are counted through all heads
            active->multiply(m, given, out, to.row_stride, head * each, (head + 1) * each);
        }
    });
}

}  // namespace ebbtide
