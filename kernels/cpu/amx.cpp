// Products of codes, of weights and of pages, by AMX's tiles where there are many rows; all else is avx512vnni's, to the bit.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "kernels.h"

namespace ebbtide {
namespace {
#include "half.h"
#include "lanes.h"
#include "amx_tiles.h"
#include "planes.h"
#include "pages.h"
#include "partials.h"
#include "runs.h"
#include "codes.h"
#include "tiles.h"
#include "quads.h"
#include "attend.h"
#include "join.h"
#include "row_groups.h"
#include "matmul_groups.h"
#include "matmul_strips.h"

void multiply(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    if (rows.count < AMX_ROWS) return kernels_avx512vnni().multiply(m, rows, out, stride, begin, end);
    switch (m.kind) {
        case WEIGHT_INT8: return multiply_strips<Group8>(m, rows, out, stride, begin, end);
        case WEIGHT_INT4: return multiply_strips<Group4<Int4>>(m, rows, out, stride, begin, end);
        case WEIGHT_FLOAT4: return multiply_strips<Group4<Float4>>(m, rows, out, stride, begin, end);
        case WEIGHT_AFFINE4: return multiply_strips<Group4<Affine4>>(m, rows, out, stride, begin, end);
        default: return kernels_avx512vnni().multiply(m, rows, out, stride, begin, end);
    }
}

// Below, what turning keys and shaping tiles takes is more than tiles gain.
constexpr int64_t ATTEND_BY_AMX = 2 * AMX_ROWS;

void attend_few_or_many(const Attend &a, int64_t head, int64_t record, float *scratch, float *highest, float *total, float *out) {
    const auto attend = a.rows < ATTEND_BY_AMX ? kernels_avx512vnni().attend_chunk : attend_chunk;
    attend(a, head, record, scratch, highest, total, out);
}
void span_of_few_or_many(const Attend &a, int64_t head, int64_t first, int64_t count, float *scratch, float *highest, float *total,
                         float *out) {
    const auto attend = a.rows < ATTEND_BY_AMX ? kernels_avx512vnni().attend_span : attend_span;
    attend(a, head, first, count, scratch, highest, total, out);
}
}  // namespace

const Kernels &kernels_amx() {
    static const Kernels table = [] {
        Kernels kernels = kernels_avx512vnni();
        kernels.name = "amx";
        kernels.multiply = multiply;
        kernels.attend_scratch = attend_scratch;
        kernels.attend_chunk = attend_few_or_many;
        kernels.attend_span = span_of_few_or_many;
        return kernels;
    }();
    return table;
}
}  // namespace ebbtide
