// Products of weights and activations, for ../matmul.py.
#include <atomic>
#include <cmath>
#include <vector>

#include "bindings.h"
#include "head_products.h"
#include "repack.h"
#include "threads.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {
#include "half.h"
#include "repack_affine.h"
#include "ggml_blocks.h"
#include "ggml_numbers.h"

constexpr uintptr_t LINE = 64;

void multiply(int kind, uintptr_t weight, uintptr_t scales, int64_t first, int64_t in, int64_t outputs, uintptr_t x,
              int64_t x_stride, int64_t rows, uintptr_t out, int64_t out_stride, int threads) {
    const Matrix m{(WeightKind)kind, in, outputs, at<const void>(weight), at<const uint16_t>(scales), first};
    nb::gil_scoped_release released;
    Rows given{rows, at<const float>(x), x_stride, nullptr};
    std::vector<uint8_t> bytes;
    if (takes_bytes(m.kind)) {
        bytes.resize((size_t)(rows * row_bytes(in)) + LINE);
        uint8_t *aligned = at<uint8_t>((reinterpret_cast<uintptr_t>(bytes.data()) + LINE - 1) / LINE * LINE);
        share_out(rows, 1, rows * in * 4, threads, [&](int64_t begin, int64_t end) {
            active->quantise_rows(given.x, in, x_stride, aligned, begin, end);
        });
        given.bytes = aligned;
    }
    // What a thread is worth waking for is work: many rows on few weights are as good as the reverse.
    share_out(outputs, STRIP, weight_bytes(m) * rows, threads, [&](int64_t begin, int64_t end) {
        active->multiply(m, given, at<float>(out), out_stride, begin, end);
    });
}

// Each head by `each` outputs of its own: x (rows, heads, in), rows and heads any strides apart, to out (rows, heads, each).
void multiply_heads(int kind, uintptr_t weight, uintptr_t scales, int64_t first, int64_t in, int64_t each, int64_t heads, uintptr_t x,
                    int64_t x_stride, int64_t head_stride, int64_t rows, uintptr_t out, int threads) {
    const Matrix m{(WeightKind)kind, in, heads * each, at<const void>(weight), at<const uint16_t>(scales), first};
    nb::gil_scoped_release released;
    multiply_each_head(m, heads, rows, {at<const float>(x), x_stride, head_stride}, {at<float>(out), heads * each, each}, threads);
}

void quantise_rows(uintptr_t x, int64_t in, int64_t stride, uintptr_t bytes, int64_t rows) {
    active->quantise_rows(at<const float>(x), in, stride, at<uint8_t>(bytes), 0, rows);
}

bool quantise_weight(int kind, uintptr_t weight, int64_t out, int64_t in, int64_t bits, uintptr_t codes, uintptr_t scales, int threads) {
    const Unquantised w{(RawKind)kind, at<const void>(weight), out, in, bits};
    std::atomic<bool> good{true};
    nb::gil_scoped_release released;
    share_out((out + STRIP - 1) / STRIP, 1, out * in * 4, threads, [&](int64_t begin, int64_t end) {
        if (!active->quantise_strips(w, at<int32_t>(codes), at<uint16_t>(scales), begin, end)) good = false;
    });
    return good;
}

bool repack_mxfp4(uintptr_t blocks, int64_t blocks_stride, uintptr_t scales, int64_t scales_stride, int64_t out, int64_t groups,
                  uintptr_t codes, uintptr_t halves, int threads) {
    const Mxfp4 w{out, groups, at<const uint8_t>(blocks), blocks_stride, at<const uint8_t>(scales), scales_stride};
    std::atomic<bool> good{true};
    nb::gil_scoped_release released;
    share_out((out + STRIP - 1) / STRIP, 1, out * groups * GROUP, threads, [&](int64_t begin, int64_t end) {
        if (!repack_strips(w, at<uint8_t>(codes), at<uint16_t>(halves), begin, end)) good = false;
    });
    return good;
}

// codes: address, order, and bytes from row to row, from chunk to chunk, and of a chunk.
bool repack_affine(const std::vector<int64_t> &numbers, uintptr_t scales, uintptr_t minimums, int64_t num_scales, int64_t out,
                   int64_t groups, uintptr_t codes, uintptr_t halves, int threads) {
    if (numbers.size() != 5) throw std::invalid_argument("these are not codes");
    const Affine w{out, groups, (CodeOrder)numbers[1], at<const uint8_t>((uintptr_t)numbers[0]), numbers[2], numbers[3], numbers[4],
                   at<const float>(scales), at<const float>(minimums), num_scales};
    std::atomic<bool> good{true};
    nb::gil_scoped_release released;
    share_out((out + STRIP - 1) / STRIP, 1, out * groups * GROUP, threads, [&](int64_t begin, int64_t end) {
        if (!repack_strips(w, at<uint8_t>(codes), at<uint16_t>(halves), begin, end)) good = false;
    });
    return good;
}

bool repack_blocks(int kind, uintptr_t blocks, int64_t out, int64_t groups, uintptr_t codes, uintptr_t halves, int threads) {
    const Blocks b{(BlockKind)kind, at<const uint8_t>(blocks), out, groups};
    if (kind < Q8_0 || kind > Q4_K || (kind == Q4_K && groups % 8)) throw std::invalid_argument("these blocks are no groups");
    std::atomic<bool> good{true};
    nb::gil_scoped_release released;
    share_out((out + STRIP - 1) / STRIP, 1, out * groups * GROUP, threads, [&](int64_t begin, int64_t end) {
        if (!repack_strips(b, at<uint8_t>(codes), at<uint16_t>(halves), begin, end)) good = false;
    });
    return good;
}

void decode_blocks(int kind, uintptr_t blocks, int64_t count, uintptr_t numbers, int threads) {
    const BlockDecoder *of = decoder_of(kind);
    if (!of) throw std::invalid_argument("these blocks are not decoded here");
    nb::gil_scoped_release released;
    share_out(count, 1, count * of->numbers * 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            of->decode(at<const uint8_t>(blocks) + i * of->bytes, at<float>(numbers) + i * of->numbers);
    });
}

}  // namespace

void bind_matmul(nb::module_ &m) {
    m.def("quantise_weight", &quantise_weight, "False when a number is not finite or float16 cannot hold a scale.");
    m.def("repack_mxfp4", &repack_mxfp4, "False when float16 cannot hold a scale.");
    m.def("repack_affine", &repack_affine, "False when float16 cannot hold a number.");
    m.def("repack_blocks", &repack_blocks, "False when float16 cannot hold a number.");
    m.def("decode_blocks", &decode_blocks);
    m.def("multiply", &multiply);
    m.def("multiply_heads", &multiply_heads);
    m.def("quantise_rows", &quantise_rows, "For tests: multiply does it for itself.");
    m.def("row_bytes", &row_bytes);
}

}  // namespace ebbtide
