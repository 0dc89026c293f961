// Sums of pages' mean values, weighted by the pages' shares. Included inside an anonymous namespace, after pages.h and runs.h.

inline int64_t means_pages(const Layout &l) { return MEANS_RECORDS * l.pages_per_record; }

// What one task needs to work in, in floats.
int64_t means_scratch(const Layout &l, int64_t rows) { return (rows + 1) * whole_lanes(l.head_dim); }

// The sums over MEANS_RECORDS records of one head: out[rows][head_dim].
void sum_means(const Means &m, int64_t head, int64_t chunk, float *scratch, float *out) {
    const Layout &l = m.layout;
    const int64_t dim = l.head_dim, wide = whole_lanes(dim), rows = m.rows;
    const int64_t first = chunk * means_pages(l), left = m.num_pages - first;
    const int64_t count = left < means_pages(l) ? left : means_pages(l);
    const float *weights = m.weights + head * rows * m.num_pages + first;
    float *sums = scratch, *mean = sums + rows * wide;
    std::memset(sums, 0, (size_t)((rows + 1) * wide) * 4);
    for (int64_t p = 0; p < count; ++p) {
        float any = 0;
        for (int64_t r = 0; r < rows; ++r) any += weights[r * m.num_pages + p];
        if (any == 0) continue;
        const int64_t page = first + p, within = page % l.pages_per_record * l.kv_heads + head;
        const uint8_t *block = m.near[page / l.pages_per_record] + within * l.near_head_bytes;
        load_halves(block + l.value_mean_offset, dim, mean);
        for (int64_t r = 0; r < rows; ++r) {
            const Lanes weight = all(weights[r * m.num_pages + p]);
            float *to = sums + r * wide;
            for (int64_t j = 0; j < wide; j += 16) store(to + j, mul_add(weight, load(mean + j), load(to + j)));
        }
    }
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * dim, sums + r * wide, (size_t)dim * 4);
}
