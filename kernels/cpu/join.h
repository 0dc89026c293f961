// Partials to one: within a span record by record, then over spans as a binary counter does, the raw tokens last. The order
// depends on their numbers alone. Included inside an anonymous namespace, after partials.h and attend.h.

void join_two(int64_t rows, int64_t dim, float *highest, float *total, float *out, float *part_highest, float *part_total,
              float *part_out) {
    join({highest, total, out}, {part_highest, part_total, part_out}, rows, dim);
}

// The partial of records first .. first + count - 1 of one head; scratch as attend_chunk needs it.
void attend_span(const Attend &a, int64_t head, int64_t first, int64_t count, float *scratch, float *highest, float *total,
                 float *out) {
    const Parts whole{highest, total, out};
    const Parts part{scratch, scratch + a.rows, scratch + 2 * a.rows};
    float *rest = scratch + a.rows * (2 + a.layout.head_dim);
    attend_chunk(a, head, first, rest, highest, total, out);
    for (int64_t i = 1; i < count; ++i) {
        attend_chunk(a, head, first + i, rest, part.highest, part.total, part.out);
        join(whole, part, a.rows, a.layout.head_dim);
    }
}

// Rows begin .. end of the whole: `count` partials of `rows` rows each, one after the other, the first num_spans of which are
// spans. The partials are used up. to_out[rows][dim] is divided by the total.
void join_spans(int64_t count, int64_t num_spans, int64_t rows, int64_t dim, float *highest, float *total, float *out,
                float *to_out, int64_t begin, int64_t end) {
    const int64_t num = end - begin;
    auto at = [&](int64_t i) { return Parts{highest + i * rows, total + i * rows, out + i * rows * dim}.from(begin, dim); };
    int64_t stack[64], size[64], depth = 0;  // which partial holds the join of how many
    for (int64_t span = 0; span < num_spans; ++span) {
        stack[depth] = span;
        size[depth++] = 1;
        for (; depth > 1 && size[depth - 1] == size[depth - 2]; --depth) {
            join(at(stack[depth - 2]), at(stack[depth - 1]), num, dim);
            size[depth - 2] *= 2;
        }
    }
    for (; depth > 1; --depth) join(at(stack[depth - 2]), at(stack[depth - 1]), num, dim);
    const int64_t first = depth ? stack[0] : num_spans;
    for (int64_t i = num_spans; i < count; ++i)
        if (i != first) join(at(first), at(i), num, dim);
    const Parts whole = at(first);
    for (int64_t r = 0; r < num; ++r) {
        const Lanes share = all(whole.total[r]);
        const float *from = whole.out + r * dim;
        float *to = to_out + (begin + r) * dim;
        int64_t j = 0;
        for (; j + 16 <= dim; j += 16) store(to + j, divided(load(from + j), share));
        for (; j < dim; ++j) to[j] = from[j] / whole.total[r];
    }
}
