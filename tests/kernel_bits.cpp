// Runs every kernel of one instruction set on odd sizes and adversarial values and prints a hash of what it gives, so that
// sets of different machines can be compared: `make neon` and `make vnni` do, with AVX2, which the Python tests
// compare with the reference. Reads layouts (dispatch.layout_numbers), a line each, from standard input.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/cpu/kernels.h"

using namespace ebbtide;

namespace {

#include "../kernels/cpu/half.h"

uint64_t state = 88172645463325252ull;
uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

enum Values { NORMAL, HUGE_CHANNEL, EQUAL, ZEROS, DENORMAL, VALUES };

std::vector<float> floats(int64_t n, int values = NORMAL) {
    std::vector<float> x((size_t)n);
    for (float &one : x) one = (float)((int64_t)(next() >> 40) - (1 << 23)) * 0x1p-22f;
    if (values == HUGE_CHANNEL && n > 5) x[5] = 3e4f;
    for (float &one : x)
        one = values == EQUAL ? 0.7f : values == ZEROS ? 0.0f : values == DENORMAL ? one * 1e-30f * 1e-10f : one;
    return x;
}

std::vector<uint8_t> bytes(int64_t n) {
    std::vector<uint8_t> x((size_t)n + 64);
    for (uint8_t &one : x) one = (uint8_t)(next() >> 32);
    return x;
}

std::vector<uint16_t> halves(const std::vector<float> &x, bool bf16) {
    std::vector<uint16_t> to;
    for (float one : x) to.push_back(bf16 ? (uint16_t)(float_to_bits(one) >> 16) : half_nearest(one));
    return to;
}

// FNV-1a of some cases together.
struct Hash {
    uint64_t bits = 14695981039346656037ull;
    template <typename T>
    void add(const T *x, int64_t n) {
        for (int64_t i = 0; i < n * (int64_t)sizeof(T); ++i) bits = (bits ^ ((const uint8_t *)x)[i]) * 1099511628211ull;
    }
    template <typename T>
    void add(const std::vector<T> &x) {
        add(x.data(), (int64_t)x.size());
    }
    void print(const char *what, int64_t a, int64_t b) const { std::printf("%-12s %5" PRId64 " %5" PRId64 "  %016" PRIx64 "\n", what, a, b, bits); }
};

void rows_and_norms(const Kernels &k) {
    for (int64_t n : {1, 15, 32, 33, 200, 2048})
        for (int values = 0; values < VALUES; ++values) {
            const std::vector<float> x = floats(3 * n, values), weight = floats(n);
            std::vector<uint8_t> to((size_t)(3 * row_bytes(n)));
            std::vector<float> out((size_t)n);
            Hash hash;
            k.quantise_rows(x.data(), n, n, to.data(), 0, 3);
            hash.add(to);
            for (bool takes_mean : {false, true}) {
                k.norm({weight.data(), takes_mean ? weight.data() : nullptr, 1.0f, 1e-5f, takes_mean}, x.data(), n, out.data());
                hash.add(out);
            }
            for (Activation activation : {SILU, GELU_TANH, CLAMPED_SWIGLU, RELU2, RELU}) {
                out = floats(n, values);
                k.gate_with(activation, out.data(), weight.data(), n);
                hash.add(out);
            }
            hash.print("rows, norms", n, values);
        }
}

void weights(const Kernels &k) {
    for (int64_t in : {5, 32, 200})
        for (int values = 0; values < VALUES; ++values) {
            const int64_t out = 45, strips = (out + STRIP - 1) / STRIP;
            const std::vector<float> w = floats(out * in, values);
            const std::vector<uint16_t> narrow = halves(w, true);
            Hash hash;
            for (int64_t bits : {8, 4}) {
                std::vector<int32_t> codes((size_t)(strips * num_groups(in) * bits * STRIP));
                std::vector<uint16_t> scales((size_t)(strips * num_groups(in) * STRIP));
                for (RawKind kind : {RAW_F32, RAW_BF16}) {
                    const void *weight = kind == RAW_F32 ? (const void *)w.data() : narrow.data();
                    const bool good = k.quantise_strips({kind, weight, out, in, bits}, codes.data(), scales.data(), 0, strips);
                    hash.add(&good, 1);
                    hash.add(codes);
                    hash.add(scales);
                }
            }
            hash.print("weights", in, values);
        }
}

void products(const Kernels &k) {
    for (int64_t in : {5, 31, 64, 200, 1000})
        for (int kind = WEIGHT_F32; kind <= WEIGHT_AFFINE4; ++kind) {
            const int64_t out = 45, strips = (out + STRIP - 1) / STRIP;
            const std::vector<float> w = floats(out * in), scales = floats(2 * strips * num_groups(in) * STRIP);
            const std::vector<uint16_t> narrow = halves(w, kind == WEIGHT_BF16), scale_bits = halves(scales, false);
            std::vector<uint8_t> codes = bytes(strips * num_groups(in) * STRIP * GROUP);
            if (kind == WEIGHT_INT8)
                for (uint8_t &code : codes) code = code == 128 ? 127 : code;  // the quantiser makes no -128
            const void *weight = kind == WEIGHT_F32 ? (const void *)w.data() : takes_bytes((WeightKind)kind) ? (const void *)codes.data() : narrow.data();
            const int64_t first = takes_bytes((WeightKind)kind) ? 3 : 0;
            const Matrix m{(WeightKind)kind, in, out - first, weight, scale_bits.data(), first};
            Hash hash;
            for (int64_t rows : {1, 2, 3, 9, 40}) {
                const std::vector<float> x = floats(rows * in, (int)rows % VALUES);
                std::vector<uint8_t> held((size_t)(rows * row_bytes(in)));
                k.quantise_rows(x.data(), in, in, held.data(), 0, rows);
                std::vector<float> to((size_t)(rows * m.out));
                k.multiply(m, {rows, x.data(), in, held.data()}, to.data(), m.out, 0, m.out);
                hash.add(to);
            }
            hash.print("products", in, kind);
        }
}

// What partials and scores become.
void joins(const Kernels &k) {
    for (int64_t dim : {16, 40, 64})
        for (int64_t count : {1, 2, 5, 8}) {
            const int64_t rows = 19;
            std::vector<float> top = floats(count * rows), total = floats(count * rows), out = floats(count * rows * dim);
            for (float &one : total) one = one < -1.5f ? 0 : one * one;  // some saw nothing
            for (int64_t r = 0; r < rows; ++r) total[(size_t)r] = 1;
            std::vector<float> to_top((size_t)rows), to_total(to_top), to_out((size_t)(rows * dim));
            Hash hash;
            k.merge_chunks(count, rows, dim, top.data(), total.data(), out.data(), to_top.data(), to_total.data(), to_out.data(), 0, rows);
            hash.add(to_top);
            hash.add(to_total);
            hash.add(to_out);
            k.join_spans(count, count - 1, rows, dim, top.data(), total.data(), out.data(), to_out.data(), 0, rows);
            hash.add(to_out);
            const std::vector<float> cosines = floats(rows * dim), sines = floats(rows * dim), constant = floats(rows);
            const std::vector<float> table = floats((2 * dim + 15) / 16 * 16 + dim / 4 * 2 * TURN_BLOCK + (dim - dim / 4 + TURN_BLOCK) * TURN_DEGREES);
            std::vector<float> sums((size_t)(rows * 70));
            k.rope_scores({rows, dim, 1000, 70, cosines.data(), sines.data(), constant.data(), dim / 4, table.data(), sums.data()}, 0, 70);
            hash.add(sums);
            hash.print("joins", dim, count);
        }
}

// Layers with a state, in place. Decays and weights are made here, as each machine's library has its own exponentials.
void recurrences(const Kernels &k) {
    for (int64_t dim : {8, 24, 64, 136})
        for (int64_t tokens : {1, 5})
            for (const std::string kind : {"delta", "mamba", "kimi"}) {
                const bool is_delta = kind != "mamba", by_channel = kind == "kimi";
                const int64_t heads = 4, key_heads = 2, key_dim = dim + 3, channels = 2 * key_heads * key_dim + heads * dim, width = 3;
                const std::vector<float> mixed = floats(tokens * channels), taps = floats(width * channels), bias = floats(channels);
                const int64_t decay_dim = by_channel ? key_dim : 1;
                const std::vector<float> each = floats(tokens * heads * decay_dim), gate = floats(tokens * heads * dim), norm = floats(heads * dim);
                std::vector<float> inputs = floats((width - 1) * channels), matrices = floats(heads * key_dim * dim);
                std::vector<float> rows((size_t)(tokens * channels)), out((size_t)(tokens * heads * dim));
                std::vector<float> scratch((size_t)(key_dim * RECUR_COLUMNS)), decays = floats(tokens * heads * decay_dim), weights(decays);
                Recurrence r{};
                r.conv = {width, channels, tokens, taps.data(), bias.data(), mixed.data(), channels, inputs.data(), inputs.data()};
                r.heads = heads, r.key_heads = key_heads, r.key_dim = key_dim, r.value_dim = dim, r.norm_heads = 2;
                r.is_delta = is_delta, r.by_channel = by_channel, r.norm_eps = 1e-5f, r.most_step = r.most_gain = 1.0f;
                r.step_bias = r.rate = r.skip = each.data();
                r.norm = norm.data(), r.norm_stride = dim;
                r.steps = r.gains = each.data(), r.gate = gate.data();
                r.steps_stride = heads * decay_dim, r.gains_stride = heads, r.gate_stride = heads * dim;
                r.before = r.after = matrices.data();
                r.rows = rows.data(), r.decays = decays.data(), r.weights = weights.data(), r.out = out.data();
                for (int64_t part = 0; part < r.num_parts(); ++part) k.prepare_part(r, part);
                decays = floats(tokens * heads * decay_dim), weights = floats(tokens * heads);
                for (float &one : decays) one = std::fabs(one) / 2;
                r.decays = decays.data(), r.weights = weights.data();
                for (int64_t head = 0; head < heads; ++head)
                    for (int64_t first = 0; first < dim; first += RECUR_COLUMNS) k.take_tokens(r, head, first, scratch.data());
                k.gate_outputs(r, 0, tokens * heads / r.norm_heads);
                Hash hash;
                for (const std::vector<float> *x : {&rows, &inputs, &matrices, &out}) hash.add(*x);
                std::vector<float> products((size_t)(tokens * dim)), convolved(products);
                ShortConvolution s{{width, dim, tokens, taps.data(), nullptr, products.data(), dim, inputs.data(), inputs.data()},
                                   mixed.data(), channels, products.data(), convolved.data()};
                k.short_conv(s, 0, dim);
                hash.add(convolved);
                hash.print(kind.c_str(), dim, tokens);
            }
}

// Mamba's scan, in place, and the convolution before it.
void scans(const Kernels &k) {
    for (int64_t channels : {8, 64, 200})
        for (int64_t tokens : {1, 5}) {
            const int64_t dim = 16, width = 4;
            const std::vector<float> x = floats(tokens * channels), steps = floats(tokens * channels), gate = floats(tokens * channels);
            const std::vector<float> keys = floats(tokens * dim), queries = floats(tokens * dim), skip = floats(channels);
            const std::vector<float> taps = floats(width * channels);
            std::vector<float> rate = floats(dim * channels), state = floats(dim * channels), out((size_t)(tokens * channels));
            std::vector<float> inputs = floats((width - 1) * channels), convolved(out);
            std::vector<float> scratch((size_t)(2 * dim * SCAN_CHANNELS));
            for (float &one : rate) one = -std::fabs(one);
            const Scan s{channels, dim, tokens, rate.data(), skip.data(), x.data(), steps.data(), keys.data(), queries.data(),
                         gate.data(), channels, channels, dim, dim, channels, state.data(), state.data(), out.data()};
            for (int64_t first = 0; first < channels; first += SCAN_CHANNELS) k.scan(s, first, scratch.data());
            k.silu_conv({width, channels, tokens, taps.data(), nullptr, x.data(), channels, inputs.data(), inputs.data()},
                        convolved.data(), 0, channels);
            Hash hash;
            for (const std::vector<float> *made : {&state, &out, &inputs, &convolved}) hash.add(*made);
            hash.print("scan", channels, tokens);
        }
}

// A prefill cell: masked and not, with and without a soft-cap.
void prefill(const Kernels &k) {
    for (int64_t dim : {8, 40, 64, 128})
        for (int64_t keys : {1, 17, 150})
            for (int way = 0; way < 4; ++way) {
                const int64_t heads = 2, rows = 61;
                const std::vector<float> q = floats(heads * rows * dim, way == 3 ? HUGE_CHANNEL : NORMAL);
                const std::vector<float> keys_of = floats(heads * keys * dim), values = floats(heads * keys * dim);
                std::vector<uint8_t> mask = bytes(rows * keys);
                for (uint8_t &one : mask) one = one % 3 == 0;
                std::vector<float> top((size_t)(heads * rows)), total(top), out((size_t)(heads * rows * dim));
                PrefillAttend a{heads, dim, rows, keys, q.data(), keys_of.data(), values.data(), keys * dim, keys * dim,
                                way % 2 ? mask.data() : nullptr, rows, way == 2 ? 3.0f : 0.0f, top.data(), total.data(), out.data(), nullptr};
                std::vector<float> packed((size_t)k.prefill_floats(a)), scratch((size_t)k.prefill_scratch(a));
                a.packed = packed.data();
                for (int64_t i = 0; i < k.prefill_panels(a); ++i) k.pack_panel(a, i);
                for (int64_t head = 0; head < heads; ++head)
                    for (int64_t first = 0; first < rows; first += PREFILL_ROWS)
                        k.attend_block(a, head, first, rows - first < PREFILL_ROWS ? rows - first : PREFILL_ROWS, scratch.data());
                Hash hash;
                hash.add(top);
                hash.add(total);
                hash.add(out);
                hash.print("prefill", dim, keys * 10 + way);
            }
}

// Raw tokens in two runs: attention to them, and how far their values are spread.
void raw_tokens(const Kernels &k) {
    for (int64_t dim : {64, 40})
        for (RawKind kind : {RAW_F32, RAW_BF16, RAW_F16}) {
            Hash hash;
            const int64_t heads = 2, rows = 3, counts[] = {5, 70}, width = kind == RAW_F32 ? 4 : 2;
            std::vector<uint8_t> held[4];
            std::vector<RawRun> runs;
            for (int i = 0; i < 2; ++i) {
                for (int part = 0; part < 2; ++part) {
                    const std::vector<float> x = floats(heads * counts[i] * dim);
                    std::vector<uint8_t> &to = held[2 * i + part];
                    to.resize((size_t)(heads * counts[i] * dim * width));
                    if (kind == RAW_F32) std::memcpy(to.data(), x.data(), to.size());
                    else std::memcpy(to.data(), halves(x, kind == RAW_BF16).data(), to.size());
                }
                runs.push_back({held[2 * i].data(), held[2 * i + 1].data(), counts[i] * dim * width, counts[i]});
            }
            const std::vector<float> q = floats(heads * rows * dim);
            const std::vector<float> null_scores = floats(heads * rows);
            const RawAttend a{kind, heads, dim, rows, q.data(), 0.0f, runs.data(), 2, null_scores.data()};
            std::vector<float> work((size_t)k.raw_scratch(a)), top((size_t)rows), total(top), out((size_t)(rows * dim));
            for (int64_t head = 0; head < heads; ++head) {
                k.attend_raw(a, head, work.data(), top.data(), total.data(), out.data());
                hash.add(top);
                hash.add(total);
                hash.add(out);
                const float spread = k.value_spread(a, head, work.data());
                hash.add(&spread, 1);
            }
            hash.print("raw tokens", dim, (int64_t)kind);
        }
}

void page_bounds(const Kernels &k, const Layout &l, const std::vector<const uint8_t *> &near, const float *q, int64_t rows, Hash &hash) {
    const int64_t records = (int64_t)near.size(), num_pages = records * l.pages_per_record;
    std::vector<float> bounds((size_t)(l.kv_heads * rows * num_pages));
    for (int64_t record = 0; record < records; ++record) k.bound_record({l, rows, num_pages, q, near.data(), bounds.data()}, record);
    hash.add(bounds);
}

// The estimate of every page and attention to their means, of near records alone.
void near_plane(const Kernels &k, const Layout &l, const std::vector<const uint8_t *> &near, Hash &hash) {
    const int64_t records = (int64_t)near.size(), num_pages = records * l.pages_per_record, tokens = num_pages * l.page_tokens;
    const int64_t wide = (l.head_dim + 15) / 16 * 16;
    for (int64_t rows : {1, 3, 4}) {
        std::vector<float> q = floats(l.kv_heads * rows * wide), bias = floats(l.kv_heads * rows * tokens);
        for (int64_t i = 0; i < (int64_t)q.size(); ++i) q[(size_t)i] = i % wide < l.head_dim ? q[(size_t)i] : 0;
        std::vector<float> mass((size_t)(l.kv_heads * rows * num_pages)), uneven(mass);
        std::vector<uint8_t> scratch((size_t)k.score_scratch(l) + 64);
        uint8_t *aligned = (uint8_t *)(((uintptr_t)scratch.data() + 63) / 64 * 64);
        const Score s{l, rows, tokens, num_pages, q.data(), rows == 3 ? bias.data() : nullptr, rows == 4 ? 2.0f : 0.0f, near.data(), mass.data(), uneven.data()};
        for (int64_t record = 0; record < records; ++record) k.score_record(s, record, aligned);
        hash.add(mass);
        hash.add(uneven);
        page_bounds(k, l, near, q.data(), rows, hash);
        if (!l.value_mean_offset) continue;
        const int64_t all = l.kv_heads * rows, chosen[] = {0, records - 1};
        std::vector<float> raw = floats(all), effect = floats(all), shares((size_t)(all * num_pages)), costs((size_t)(all * records));
        std::vector<float> total((size_t)all), missed(total), misplaced(total), out((size_t)(rows * l.head_dim));
        for (int64_t r = 0; r < all; ++r) {
            mass[(size_t)(r * num_pages)] = -INFINITY;
            k.page_shares({num_pages, mass.data(), raw.data(), shares.data(), total.data()}, r);
            k.record_costs({all, num_pages, l.pages_per_record, shares.data(), uneven.data(), effect.data()}, r, costs.data());
        }
        hash.add(shares);
        hash.add(total);
        hash.add(costs);
        for (int64_t r = 0; r < all; ++r)
            k.leave_out({num_pages, l.pages_per_record, rows % 2 + 1, chosen, shares.data(), uneven.data(), missed.data(), misplaced.data()}, r);
        hash.add(missed);
        hash.add(misplaced);
        const Means m{l, rows, num_pages, shares.data(), near.data()};
        std::vector<float> work((size_t)k.means_scratch(l, rows));
        for (int64_t head = 0; head < l.kv_heads; ++head) {
            k.sum_means(m, head, 0, work.data(), out.data());
            hash.add(out);
        }
    }
}

// Pages, attention to them and to raw tokens.
void pages(const Kernels &k, const Layout &l) {
    const int64_t records = 3, tokens = records * l.pages_per_record * l.page_tokens, width = l.kv_heads * l.head_dim;
    const int64_t count = records * l.blocks_per_record();
    for (int values = 0; values < DENORMAL; ++values) {
        const std::vector<float> keys = floats(tokens * width, values), held = floats(tokens * width, values);
        std::vector<uint8_t> near((size_t)(records * l.near_record_bytes + 64)), far((size_t)(records * l.record_bytes + 64));
        Hash hash;
        if (l.raw_kind == RAW_F32) {  // torch seals full pages
            const std::vector<float> raw = floats((int64_t)far.size() / 4, values);
            std::memcpy(far.data(), raw.data(), raw.size() * 4);
        } else if (l.raw_kind != CODES) {
            const std::vector<uint16_t> raw = halves(floats((int64_t)far.size() / 2, values), l.raw_kind == RAW_BF16);
            std::memcpy(far.data(), raw.data(), raw.size() * 2);
        } else if (!k.seal(l, keys.data(), held.data(), near.data(), far.data(), 0, count)) std::exit(1);
        hash.add(near);
        hash.add(far);
        std::vector<float> out_k((size_t)(tokens * width)), out_v(out_k);
        k.unpack(l, near.data(), far.data(), out_k.data(), tokens * l.head_dim, out_v.data(), tokens * l.head_dim, 0, count);
        hash.add(out_k);
        hash.add(out_v);
        std::vector<const uint8_t *> near_at, far_at;
        for (int64_t i = 0; i < records; ++i) {
            near_at.push_back(near.data() + i * l.near_record_bytes);
            far_at.push_back(far.data() + i * l.record_bytes);
        }
        for (int64_t rows : {1, 2, 3, 4, 7}) {
            const std::vector<float> q = floats(l.kv_heads * rows * l.head_dim), bias = floats(l.kv_heads * rows * tokens);
            const Attend a{l, rows, tokens, 5, tokens - 3, q.data(), rows % 2 ? bias.data() : nullptr, rows > 2 ? 2.0f : 0.0f, near_at.data(), far_at.data()};
            std::vector<float> scratch((size_t)k.attend_scratch(l, rows)), top((size_t)rows), total(top), out((size_t)(rows * l.head_dim));
            for (int64_t head = 0; head < l.kv_heads; ++head) {
                k.attend_span(a, head, 0, records, scratch.data(), top.data(), total.data(), out.data());
                hash.add(top);
                hash.add(total);
                hash.add(out);
            }
        }
        if (l.raw_kind == CODES) near_plane(k, l, near_at, hash);
        hash.print(l.raw_kind == CODES ? "codes" : "full pages", l.head_dim, values);
    }
}

}  // namespace

int main() {
    const Kernels &k = EBBTIDE_TABLE();
    rows_and_norms(k);
    weights(k);
    products(k);
    prefill(k);
    joins(k);
    raw_tokens(k);
    recurrences(k);
    scans(k);
    int64_t numbers[LAYOUT_NUMBERS];
    for (int read = 0; std::scanf("%" SCNd64, numbers + read) == 1;)
        if (++read == LAYOUT_NUMBERS) {
            Layout l;
            std::memcpy(&l, numbers, sizeof l);
            pages(k, l);
            read = 0;
        }
    return 0;
}
