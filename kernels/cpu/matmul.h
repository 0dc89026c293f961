// Products of weights and activations of every kind. Included inside an anonymous namespace, after matmul_raw.h and
// matmul_strips.h.

void multiply(const Matrix &m, const Rows &rows, float *out, int64_t stride, int64_t begin, int64_t end) {
    switch (m.kind) {
        case WEIGHT_F32: return multiply_raw<LoadF32>(m, rows, out, stride, begin, end);
        case WEIGHT_BF16: return multiply_raw<LoadBF16>(m, rows, out, stride, begin, end);
        case WEIGHT_F16: return multiply_raw<LoadF16>(m, rows, out, stride, begin, end);
        case WEIGHT_INT8: return multiply_strips<Group8>(m, rows, out, stride, begin, end);
        case WEIGHT_INT4: return multiply_strips<Group4<Int4>>(m, rows, out, stride, begin, end);
        case WEIGHT_FLOAT4: return multiply_strips<Group4<Float4>>(m, rows, out, stride, begin, end);
        case WEIGHT_AFFINE4: return multiply_strips<Group4<Affine4>>(m, rows, out, stride, begin, end);
    }
}
