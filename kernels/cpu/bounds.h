// The greatest scores that keys within pages' boxes could have (../bounds.py). Included inside an anonymous namespace, after
// pages.h and runs.h.

// All pages and heads of one record.
void bound_record(const Bounds &b, int64_t record) {
    const Layout &l = b.layout;
    const int64_t dim = l.head_dim, wide = whole_lanes(dim);
    const Lanes most_code = all((float)((1 << l.key_bits) - 1));
    for (int64_t block = 0; block < l.blocks_per_record(); ++block) {
        const int64_t head = block % l.kv_heads, page = record * l.pages_per_record + block / l.kv_heads;
        const uint8_t *least = b.near[record] + block * l.near_head_bytes + l.key_min_offset, *step = least + 2 * dim;
        by_rows<4>(b.rows, [&](auto count, int64_t r) {
            constexpr int ROWS = decltype(count)::VALUE;
            const float *q = b.q + (head * b.rows + r) * wide;
            Lanes sums[4];
            float bounds[4];
            for (int i = 0; i < 4; ++i) sums[i] = zero();
            for (int64_t j = 0; j < wide; j += 16) {
                const Lanes low = load_some_f16(least + 2 * j, dim - j);
                const Lanes high = mul_add(load_some_f16(step + 2 * j, dim - j), most_code, low);
                EBBTIDE_UNROLLED for (int i = 0; i < ROWS; ++i) {
                    const Lanes query = load(q + i * wide + j);
                    sums[i] = add(sums[i], larger(mul(query, low), mul(query, high)));
                }
            }
            sum_four(sums[0], sums[1], sums[2], sums[3], bounds);
            for (int i = 0; i < ROWS; ++i) b.bounds[(head * b.rows + r + i) * b.num_pages + page] = bounds[i];
        });
    }
}
