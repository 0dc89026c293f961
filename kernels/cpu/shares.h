// What pages are worth to a query row, and what goes wrong where they are not read (../selection.py has the formulas).
// Included inside an anonymous namespace, after lanes.h and runs.h.

// Sixteen floats, of which `count` are there; `other` stands for the rest.
inline Lanes load_some(const float *from, int64_t count, float other) {
    if (count >= 16) return load(from);
    float lanes[16];
    for (int64_t i = 0; i < 16; ++i) lanes[i] = i < count ? from[i] : other;
    return load(lanes);
}

inline void store_some(float *to, int64_t count, Lanes x) {
    if (count >= 16) return store(to, x);
    float lanes[16];
    store(lanes, x);
    std::memcpy(to, lanes, (size_t)count * 4);
}

// The share of all mass that lies in each page of a row, and the log of all mass.
void page_shares(const Shares &s, int64_t row) {
    const int64_t pages = s.num_pages;
    const float *log_mass = s.log_mass + row * pages;
    float *shares = s.shares + row * pages, raw[16];
    for (float &one : raw) one = -INFINITY;
    raw[0] = s.raw_log_mass[row];
    Lanes tops = larger(load(raw), all(UNSEEN));
    for (int64_t p = 0; p < pages; p += 16) tops = larger(load_some(log_mass + p, pages - p, UNSEEN), tops);
    const float most = largest(tops);
    const Lanes least = all(2e-38f);  // exp_lanes ends at 1.6e-38; what is not there has no mass at all
    const auto weight = [&](Lanes x) { return larger(sub(exp_lanes(sub(x, all(most))), least), zero()); };
    Lanes along = weight(load(raw));
    for (int64_t p = 0; p < pages; p += 16) {
        const Lanes mass = weight(load_some(log_mass + p, pages - p, -INFINITY));
        store_some(shares + p, pages - p, mass);
        along = add(along, mass);
    }
    const float total = sum(along);
    const Lanes scale = all(total > 0 ? 1 / total : 0.0f);
    for (int64_t p = 0; p < pages; p += 16) store_some(shares + p, pages - p, mul(load_some(shares + p, pages - p, 0), scale));
    s.log_total[row] = total > 0 ? most + std::log(total) : -INFINITY;
}

// What a row gets wrong without each record, to costs[record][row].
void record_costs(const Costs &c, int64_t row, float *costs) {
    const float *shares = c.shares + row * c.num_pages, *unevenness = c.unevenness ? c.unevenness + row * c.num_pages : nullptr;
    const float effect = c.effect ? c.effect[row] : 1.0f;
    for (int64_t first = 0; first < c.num_pages; first += c.pages_per_record) {
        float wrong = 0;
        for (int64_t p = first; p < first + c.pages_per_record; ++p)
            if (shares[p] > 0) wrong += unevenness ? shares[p] * unevenness[p] : shares[p];
        costs[first / c.pages_per_record * c.rows + row] = wrong * effect;
    }
}

// The sums of shares, and of shares times unevenness, of a row's pages outside some records, whose shares become 0.
void leave_out(const LeftOut &l, int64_t row) {
    float *shares = l.shares + row * l.num_pages;
    const float *unevenness = l.unevenness + row * l.num_pages;
    for (int64_t i = 0; i < l.num_chosen; ++i)
        std::memset(shares + l.chosen[i] * l.pages_per_record, 0, (size_t)l.pages_per_record * 4);
    Lanes missed = zero(), misplaced = zero();
    for (int64_t p = 0; p < l.num_pages; p += 16) {
        const Lanes share = load_some(shares + p, l.num_pages - p, 0);
        missed = add(missed, share);
        misplaced = mul_add(share, load_some(unevenness + p, l.num_pages - p, 0), misplaced);
    }
    l.missed[row] = sum(missed);
    l.misplaced[row] = sum(misplaced);
}

// The root mean square distance of one head's raw values from their mean; scratch as attend_raw's.
float value_spread(const RawAttend &a, int64_t head, float *scratch) {
    const int64_t wide = whole_lanes(a.head_dim);
    float *mean = scratch, *apart = mean + wide, *block = apart + wide;
    std::memset(mean, 0, (size_t)(2 * wide) * 4);
    int64_t tokens = 0;
    for (int64_t i = 0; i < a.num_runs; ++i) tokens += a.runs[i].tokens;
    if (!tokens) return 0;
    // to[j] += use(value[j], j) over all tokens.
    const auto add_up = [&](float *to, const auto &use) {
        for (int64_t i = 0; i < a.num_runs; ++i)
            with_run(a.kind, a.head_dim, a.runs[i].values + head * a.runs[i].head_bytes, a.runs[i].tokens, block,
                     [&](auto from, const uint8_t *v, int64_t row_bytes, int64_t, int64_t count) {
                         typedef decltype(from) From;
                         for (int64_t j = 0; j < wide; j += 16) {
                             Lanes along = load(to + j);
                             for (int64_t t = 0; t < count; ++t)
                                 along = add(along, use(From::lanes(v + t * row_bytes + j * From::BYTES), j));
                             store(to + j, along);
                         }
                     });
    };
    add_up(mean, [](Lanes value, int64_t) { return value; });
    for (int64_t j = 0; j < wide; j += 16) store(mean + j, mul(load(mean + j), all(1.0f / (float)tokens)));
    add_up(apart, [&](Lanes value, int64_t j) {
        const Lanes off = sub(value, load(mean + j));
        return mul(off, off);
    });
    for (int64_t j = 0; j < a.value_first; ++j) apart[j] = 0;
    Lanes along = zero();
    for (int64_t j = 0; j < wide; j += 16) along = add(along, load(apart + j));
    return std::sqrt(sum(along) / (float)tokens);
}
