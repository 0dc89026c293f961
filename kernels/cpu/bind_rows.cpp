// What stands between products, for many rows: ../norm.py, ../gate.py, ../turn.py, ../add.py and ../raw_rows.py.
#include <cstring>

#include "bindings.h"
#include "turn.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

#include "half.h"
#include "store.h"

// Rows of n, normed, to out.
void norm(const std::vector<int64_t> &numbers, double offset, double eps, uintptr_t x, int64_t n, int64_t rows, uintptr_t out,
          int threads) {
    Reader reader{numbers};
    const double floats[] = {offset, eps};
    const Norm how = read_norm(reader, floats);
    share_out(rows, 1, rows * n * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) active->norm(how, at<const float>(x) + r * n, n, at<float>(out) + r * n);
    });
}

// Rows of n: gate = activation(gate) * up.
void gate_with(int activation, uintptr_t gate, uintptr_t up, int64_t n, int64_t rows, int threads) {
    share_out(rows, 1, rows * n * 16, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            active->gate_with((Activation)activation, at<float>(gate) + r * n, at<const float>(up) + r * n, n);
    });
}

// x (tokens, heads, dim) to out, whose tokens and heads are as many floats apart; cosines and sines are (tokens, width).
void turn(uintptr_t x, int64_t tokens, int64_t heads, int64_t dim, int64_t width, bool is_interleaved, uintptr_t cosines,
          uintptr_t sines, double scale, uintptr_t out, int64_t token_stride, int64_t head_stride, int threads) {
    const float factor = (float)scale;
    share_out(tokens, 1, tokens * heads * dim * 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t h = 0; h < heads; ++h) {
                float *to = at<float>(out) + t * token_stride + h * head_stride;
                std::memcpy(to, at<const float>(x) + (t * heads + h) * dim, (size_t)dim * sizeof(float));
                turn_head(to, width, is_interleaved, at<const float>(cosines) + t * width, at<const float>(sines) + t * width);
                if (factor != 1.0f)
                    for (int64_t i = 0; i < dim; ++i) to[i] *= factor;
            }
    });
}

// out = x + y * factor, of n numbers.
void add_scaled(uintptr_t x, uintptr_t y, double factor, uintptr_t out, int64_t n, int threads) {
    constexpr int64_t GRAIN = 1024;
    const float *a = at<const float>(x), *b = at<const float>(y), times = (float)factor;
    float *to = at<float>(out);
    share_out(n, GRAIN, n * 12, threads, [&](int64_t begin, int64_t end) {
        if (times == 1.0f)
            for (int64_t i = begin; i < end; ++i) to[i] = a[i] + b[i];
        else
            for (int64_t i = begin; i < end; ++i) to[i] = a[i] + b[i] * times;
    });
}

// x (tokens, heads, dim) float32 to floats of a RawKind; a head's tokens lie side by side, heads head_bytes apart.
void store_rows(uintptr_t x, int64_t tokens, int64_t heads, int64_t dim, int kind, uintptr_t to, int64_t head_bytes, int threads) {
    const int64_t row_bytes = dim * (kind == RAW_F32 ? 4 : 2);
    share_out(tokens, 1, tokens * heads * dim * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            store_heads((RawKind)kind, at<const float>(x) + t * heads * dim, at<uint8_t>(to) + t * row_bytes, head_bytes, heads, dim);
    });
}

// The inverse: to (heads, tokens, dim) float32, heads as many floats apart.
void read_rows(uintptr_t from, int64_t head_bytes, int64_t heads, int64_t tokens, int64_t dim, int kind, uintptr_t to,
               int64_t head_stride, int threads) {
    share_out(heads, 1, tokens * heads * dim * 6, threads, [&](int64_t begin, int64_t end) {
        for (int64_t h = begin; h < end; ++h)
            active->read_raw((RawKind)kind, at<const uint8_t>(from) + h * head_bytes, tokens * dim, at<float>(to) + h * head_stride);
    });
}

}  // namespace

void bind_rows(nb::module_ &m) {
    typedef nb::call_guard<nb::gil_scoped_release> Released;
    m.def("norm", &norm, Released());
    m.def("gate_with", &gate_with, Released());
    m.def("turn", &turn, Released());
    m.def("add_scaled", &add_scaled, Released());
    m.def("store_rows", &store_rows, Released());
    m.def("read_rows", &read_rows, Released());
}

}  // namespace ebbtide
