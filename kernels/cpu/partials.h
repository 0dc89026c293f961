// Partials of query rows (../attention.py) and the join of two. Included inside an anonymous namespace, after lanes.h.

// Rows of partials: highest[rows], total[rows], out[rows][dim]. A total of 0 is that of a row that saw nothing.
struct Parts {
    float *highest, *total, *out;
    Parts from(int64_t row, int64_t dim) const { return {highest + row, total + row, out + row * dim}; }
};

// `to` becomes the join of `to` and `part`, for `rows` rows.
inline void join(const Parts &to, const Parts &part, int64_t rows, int64_t dim) {
    for (int64_t first = 0; first < rows; first += 16) {
        const int64_t count = rows - first < 16 ? rows - first : 16;
        float mine[16] = {0}, theirs[16] = {0};
        for (int64_t i = 0; i < count; ++i) {
            const float a = to.highest[first + i], b = part.highest[first + i], most = a > b ? a : b;
            mine[i] = a - most;
            theirs[i] = b - most;
            to.highest[first + i] = most;
        }
        store(mine, exp_lanes(load(mine)));
        store(theirs, exp_lanes(load(theirs)));
        for (int64_t i = 0; i < count; ++i) {
            const int64_t r = first + i;
            const float *from = part.out + r * dim;
            float *sums = to.out + r * dim;
            if (part.total[r] == 0) continue;
            if (to.total[r] == 0) mine[i] = 0;
            to.total[r] = to.total[r] * mine[i] + part.total[r] * theirs[i];
            const Lanes keep = all(mine[i]), take = all(theirs[i]);
            int64_t j = 0;
            for (; j + 16 <= dim; j += 16) store(sums + j, add(mul(load(sums + j), keep), mul(load(from + j), take)));
            for (; j < dim; ++j) sums[j] = sums[j] * mine[i] + from[j] * theirs[i];
        }
    }
}
