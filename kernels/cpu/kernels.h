// The table of kernels that each instruction set fills. Every function works on a range of independent tasks and
// knows no threads, so that a result never depends on how the tasks were shared out.
#pragma once
#include <cstdint>

#include "layout.h"

namespace ebbtide {

// ---- Products of weights and activations: how to use them -----------------------------------------------------------
//
//     std::vector<uint8_t> bytes(row_bytes(in) * rows);                  // only where takes_bytes(kind)
//     kernels.quantise_rows(x, in, in, bytes.data(), 0, rows);           // once, for every product with these rows
//     kernels.multiply(q_proj, {rows, x, in, bytes.data()}, q, q_stride, begin, end);      // by parts of STRIP outputs,
//     kernels.multiply(k_proj, {rows, x, in, bytes.data()}, k, k_stride, begin, end);      // from any thread
//
// An output's bits depend on its own row of x and its own row of the weight alone: not on begin and end, nor on how many
// rows there are.
// FLOAT4: MXFP4; AFFINE4: (code - offset) * scale, with an offset for each group and output
enum WeightKind { WEIGHT_F32, WEIGHT_BF16, WEIGHT_F16, WEIGHT_INT8, WEIGHT_INT4, WEIGHT_FLOAT4, WEIGHT_AFFINE4 };
constexpr int64_t GROUP = 32;  // inputs that share a scale in weights of 8 and 4 bits, and in rows of bytes
constexpr int64_t STRIP = 16;  // outputs that lie interleaved in weights of 8 and 4 bits; ../quantised.py packs them

// A weight. Where one of 8 or 4 bits is a part of another, its first output may lie within a strip.
struct Matrix {
    WeightKind kind;
    int64_t in, out;         // inputs and outputs
    const void *weight;      // F32, BF16, F16: (out, in); else from the strip that holds the first output on
    const uint16_t *scales;  // 8 and 4 bits: float16 (strips, groups, STRIP), AFFINE4 (strips, groups, 2, STRIP); else null
    int64_t first;           // the first output's place in its strip; 0 for F32, BF16, F16
};

// A weight that becomes INT8 or INT4: (out, in) floats of a kind that is not CODES, side by side.
struct Unquantised {
    RawKind kind;
    const void *weight;
    int64_t out, in, bits;
};

// Rows of activations, as products take them.
struct Rows {
    int64_t count;
    const float *x;        // F32, BF16, F16: the rows' floats
    int64_t stride;        // floats from row to row of x
    const uint8_t *bytes;  // 8 and 4 bits: what quantise_rows wrote, row_bytes(in) for each row
};

inline bool takes_bytes(WeightKind kind) { return kind >= WEIGHT_INT8; }
inline int64_t weight_bytes(const Matrix &m) {  // with scales; for sharing out
    constexpr double EACH[] = {4, 2, 2, 1.0625, 0.5625, 0.5625, 0.625};
    return (int64_t)(EACH[m.kind] * (double)(m.in * m.out));
}
inline int64_t num_groups(int64_t in) { return (in + GROUP - 1) / GROUP; }
// Of one row of bytes, which consists of groups: 32 codes (int8), their scale (float32), -8 times their sum (int32).
constexpr int64_t ROW_GROUP_BYTES = GROUP + 8;
inline int64_t row_bytes(int64_t in) { return (num_groups(in) * ROW_GROUP_BYTES + 63) / 64 * 64; }

// Attention of `rows` query rows of every KV head over whole records. They may be some of more, which lie side by side.
struct Attend {
    Layout layout;
    int64_t rows, num_tokens;
    int64_t visible_from, visible_to;  // tokens outside are passed over
    const float *q;                    // (kv_heads, all_rows, head_dim)
    const float *bias;                 // (kv_heads, all_rows, num_tokens), added to scores, or null
    float softcap;                     // of scores, bias included; 0 = none
    const uint8_t *const *near, *const *records;  // each record, wherever it lies
    int64_t all_rows = rows, first_row = 0;

    int64_t row_of(int64_t head) const { return head * all_rows + first_row; }
};
constexpr int64_t ATTEND_ROWS = 64;  // of one task: what they work in stays in the second cache
constexpr float UNSEEN = -1e30f;  // ../attention.py's

// Attention of many query rows over a run of float32 keys and values (prefill.h).
struct PrefillAttend {
    int64_t kv_heads, head_dim, rows, num_keys;
    const float *q;              // (kv_heads, rows, head_dim)
    const float *k, *v;          // (kv_heads, num_keys, head_dim), of each head side by side
    int64_t k_stride, v_stride;  // floats from head to head
    const uint8_t *mask;         // (mask_rows, num_keys): row r sees what row r % mask_rows of it says; or null
    int64_t mask_rows;
    float softcap;               // of scores; 0 = none
    float *highest, *total, *out;  // (kv_heads, rows), the same, (kv_heads, rows, head_dim)
    float *packed;               // prefill_floats
};
constexpr int64_t PREFILL_ROWS = 48;  // of one task: their scores for a thousand keys stay in the second cache

// Tokens that are held raw, side by side for each head.
struct RawRun {
    const uint8_t *keys, *values;  // of head 0's first token
    int64_t head_bytes;            // from head to head, of either
    int64_t tokens;
};
constexpr int64_t MAX_RUNS = 1024;

// Attention of `rows` query rows of every KV head over all tokens of some runs.
struct RawAttend {
    RawKind kind;
    int64_t kv_heads, head_dim, rows;
    const float *q;  // (kv_heads, rows, head_dim)
    float softcap;
    const RawRun *runs;
    int64_t num_runs;
    const float *null_scores = nullptr;  // (kv_heads, rows): of what each row sees besides, without a value; or null
    int64_t value_first = 0;             // elements of values before it are passed over where their spread is asked for
};

// Sums of cosines and sines of turning angles at consecutive positions, for rows of factors.
struct RopeScores {
    int64_t rows, pairs, start, count;
    const float *cosines, *sines, *constant;  // (rows, pairs), likewise, (rows)
    int64_t num_fast;
    const float *table;  // of ../rope_scores.py's Turns, as num_fast is
    float *out;          // (rows, count)
};
constexpr int64_t TURN_BLOCK = 64, TURN_DEGREES = 16;  // its BLOCK and DEGREES

// The estimate of every page from the near records alone.
struct Score {
    Layout layout;
    int64_t rows, num_tokens, num_pages;
    const float *q;             // (kv_heads, rows, head_dim padded with zeros to sixteens)
    const float *bias;          // (kv_heads, rows, num_tokens), added to scores, or null
    float softcap;              // of scores, bias included; 0 = none
    const uint8_t *const *near;  // each near record
    float *log_mass, *unevenness;  // (kv_heads, rows, num_pages)
};

// The greatest score that a key in a page's box could have.
struct Bounds {
    Layout layout;
    int64_t rows, num_pages;
    const float *q;              // (kv_heads, rows, head_dim padded with zeros to sixteens)
    const uint8_t *const *near;  // each near record
    float *bounds;               // (kv_heads, rows, num_pages)
};

// What pages are worth to query rows, of all heads.
struct Shares {
    int64_t num_pages;
    const float *log_mass, *raw_log_mass;  // (rows, num_pages), (rows); -infinity: not there
    float *shares, *log_total;             // (rows, num_pages), (rows)
};

// What rows get wrong where records are not read.
struct Costs {
    int64_t rows, num_pages, pages_per_record;
    const float *shares, *unevenness;  // (rows, num_pages); null: 1 everywhere
    const float *effect;               // (rows), or null: 1
};

// What lies outside the records that are read.
struct LeftOut {
    int64_t num_pages, pages_per_record, num_chosen;
    const int64_t *chosen;
    float *shares;              // (rows, num_pages)
    const float *unevenness;    // (rows, num_pages)
    float *missed, *misplaced;  // (rows)
};

// Mean values of pages, to be added up.
struct Means {
    Layout layout;
    int64_t rows, num_pages;
    const float *weights;        // (kv_heads, rows, num_pages)
    const uint8_t *const *near;  // each near record
};
constexpr int64_t MEANS_RECORDS = 64;  // of one sum: fixed, so that the bits are

// Of one row: x / rms(x) * (weight + offset), for a layer norm the same of x less its mean; plus the bias, if there is one.
struct Norm {
    const float *weight, *bias;  // (n); without a weight there is no norm
    float offset, eps;
    bool takes_mean;
};

enum Activation { SILU, GELU, GELU_TANH, SIGMOID, CLAMPED_SWIGLU, RELU2, RELU, SOFTPLUS };  // in the order of ../gate.py

// A causal convolution of each channel's inputs with its taps.
struct Convolution {
    int64_t width, channels, tokens;
    const float *taps, *bias;  // (width, channels), the oldest input's first; (channels), or null
    const float *inputs;       // (tokens, channels), `stride` floats from row to row
    int64_t stride;
    const float *before;       // (width - 1, channels): the inputs before these
    float *after;              // (width - 1, channels): the last of all; may be `before`

    // The i-th input, those before these included: token t sees t .. t + width - 1.
    const float *input(int64_t i) const { return i < width - 1 ? before + i * channels : inputs + (i - width + 1) * stride; }
};
constexpr int64_t MAX_CONV_WIDTH = 16;

// Tokens that go through a layer which keeps a matrix for each head: ../recurrence.py. In three steps, each of independent tasks:
// prepare_part, take_tokens, gate_outputs.
struct Recurrence {
    Convolution conv;
    int64_t heads, key_heads, key_dim, value_dim, norm_heads;
    bool is_delta, by_channel;
    float norm_eps, least_step, most_step, least_log_decay, most_gain;
    const float *step_bias, *rate, *skip;      // (heads * decay_dim()), (heads), (heads); skip may be null
    const float *norm;                         // (value_dim) of each head, `norm_stride` floats apart
    int64_t norm_stride;
    const float *steps, *gains, *gate;         // rows of heads * decay_dim(), heads, heads * value_dim
    int64_t steps_stride, gains_stride, gate_stride;
    const float *before;                       // (heads, key_dim, value_dim)
    float *after;                              // the same; may be `before`
    float *rows;                               // (channels * tokens), of each part side by side: what the convolution gives
    float *decays;                             // (heads, tokens, decay_dim()): by what a matrix, or each of its rows, shrinks
    float *weights;                            // (heads, tokens): what new values are worth
    float *out;                                // (tokens, heads * value_dim)

    // Numbers that a head's decay has.
    int64_t decay_dim() const { return by_channel ? key_dim : 1; }
    // Parts are a head's queries, keys or values, and lie in a row in this order, or for Mamba-2 in the opposite one.
    int64_t num_parts() const { return 2 * key_heads + heads; }
    int64_t queries(int64_t key_head) const { return (is_delta ? 0 : heads * value_dim + key_heads * key_dim) + key_head * key_dim; }
    int64_t keys(int64_t key_head) const { return (is_delta ? key_heads * key_dim : heads * value_dim) + key_head * key_dim; }
    int64_t values(int64_t head) const { return (is_delta ? 2 * key_heads * key_dim : 0) + head * value_dim; }
    // Where the tokens of the part that begins at a channel lie, one after the other.
    float *part(int64_t channel) const { return rows + channel * conv.tokens; }
};
constexpr int64_t RECUR_COLUMNS = 128;  // of a matrix, in one task

// A gated short convolution: c conv(b x).
struct ShortConvolution {
    Convolution conv;    // its inputs are `products`, side by side
    const float *mixed;  // b, c and x of each token, `stride` floats from row to row
    int64_t stride;
    float *products;     // (tokens, channels): b x
    float *out;          // (tokens, channels)
};

// Mamba's selective scan: every channel has a state of its own, `dim` numbers, which keys and queries are shared for. Rows of
// channels, of keys and queries, each with the floats from one to the next.
struct Scan {
    int64_t channels, dim, tokens;
    const float *rate, *skip;                  // (dim, channels), below 0; (channels)
    const float *x, *steps, *keys, *queries, *gate;
    int64_t x_stride, steps_stride, keys_stride, queries_stride, gate_stride;
    const float *before;                       // (dim, channels)
    float *after;                              // the same; may be `before`
    float *out;                                // (tokens, channels)
};
constexpr int64_t SCAN_CHANNELS = 64;  // of one task

struct Kernels {
    const char *name;
    bool byte_products;  // codes are multiplied faster than floats by however many rows
    // Blocks begin .. end to float32 keys and values; strides are in floats, from head to head.
    void (*unpack)(const Layout &, const uint8_t *near, const uint8_t *records, float *out_k, int64_t k_stride,
                   float *out_v, int64_t v_stride, int64_t begin, int64_t end);
    // `count` floats of a kind to float32.
    void (*read_raw)(RawKind, const uint8_t *data, int64_t count, float *out);
    // Tokens (num_tokens, kv_heads, head_dim) float32 to blocks begin .. end, padding zeroed beforehand. False
    // when a number is not finite or float16 cannot hold a parameter.
    bool (*seal)(const Layout &, const float *k, const float *v, uint8_t *near, uint8_t *records, int64_t begin,
                 int64_t end);
    // Rows begin .. end of x, `stride` floats apart, to bytes with a scale for each group of 32.
    void (*quantise_rows)(const float *x, int64_t in, int64_t stride, uint8_t *bytes, int64_t begin, int64_t end);
    // Strips begin .. end of a weight: codes (groups, bits, STRIP) int32 and scales (groups, STRIP) float16 of each, padding
    // included. False where it is not finite or float16 cannot hold a scale.
    bool (*quantise_strips)(const Unquantised &, int32_t *codes, uint16_t *scales, int64_t begin, int64_t end);
    // Outputs begin .. end of a product, for all rows; out is (rows, out), `stride` floats from row to row. Any begin and
    // end will do; multiples of STRIP cost nothing.
    void (*multiply)(const Matrix &, const Rows &, float *out, int64_t stride, int64_t begin, int64_t end);
    // One row of n: normed, and gate = activation(gate) * up.
    void (*norm)(const Norm &, const float *x, int64_t n, float *out);
    void (*gate_with)(Activation, float *gate, const float *up, int64_t n);
    // One record of one head to a partial; scratch holds attend_scratch floats.
    int64_t (*attend_scratch)(const Layout &, int64_t rows);
    void (*attend_chunk)(const Attend &, int64_t head, int64_t record, float *scratch, float *highest, float *total,
                         float *out);
    // Joins rows begin .. end of `chunks` partials: highest[chunks][rows], total likewise, out[chunks][rows][dim].
    void (*merge_chunks)(int64_t chunks, int64_t rows, int64_t dim, const float *highest, const float *total,
                         const float *out, float *to_highest, float *to_total, float *to_out, int64_t begin,
                         int64_t end);
    // Records first .. first + count - 1 of one head to a partial; scratch as attend_chunk's.
    void (*attend_span)(const Attend &, int64_t head, int64_t first, int64_t count, float *scratch, float *highest,
                        float *total, float *out);
    // Prefill: what `packed` and a task's scratch take, in floats; panels to pack, and each of them; then blocks of rows.
    int64_t (*prefill_floats)(const PrefillAttend &);
    int64_t (*prefill_scratch)(const PrefillAttend &);
    int64_t (*prefill_panels)(const PrefillAttend &);
    void (*pack_panel)(const PrefillAttend &, int64_t panel);
    void (*attend_block)(const PrefillAttend &, int64_t head, int64_t first, int64_t count, float *scratch);
    // `to` becomes the join of two partials of `rows` rows.
    void (*join_two)(int64_t rows, int64_t dim, float *highest, float *total, float *out, float *part_highest, float *part_total,
                     float *part_out);
    // Positions begin .. end, counted from the first.
    void (*rope_scores)(const RopeScores &, int64_t begin, int64_t end);
    // Raw tokens of one head to a partial; scratch holds raw_scratch floats.
    int64_t (*raw_scratch)(const RawAttend &);
    void (*attend_raw)(const RawAttend &, int64_t head, float *scratch, float *highest, float *total, float *out);
    // Rows begin .. end of the join of `count` partials of `rows` rows each, the first num_spans of which are spans, to
    // to_out[rows][dim], divided by their totals. The partials are used up.
    void (*join_spans)(int64_t count, int64_t num_spans, int64_t rows, int64_t dim, float *highest, float *total, float *out,
                       float *to_out, int64_t begin, int64_t end);
    // The pages of one record, all heads; scratch holds score_scratch bytes, aligned to 64.
    int64_t (*score_scratch)(const Layout &);
    void (*score_record)(const Score &, int64_t record, uint8_t *scratch);
    void (*bound_record)(const Bounds &, int64_t record);
    // One row each.
    void (*page_shares)(const Shares &, int64_t row);
    void (*record_costs)(const Costs &, int64_t row, float *costs);
    void (*leave_out)(const LeftOut &, int64_t row);
    // One head's raw values; scratch holds raw_scratch floats.
    float (*value_spread)(const RawAttend &, int64_t head, float *scratch);
    // MEANS_RECORDS records of one head; scratch holds means_scratch floats.
    int64_t (*means_scratch)(const Layout &, int64_t rows);
    void (*sum_means)(const Means &, int64_t head, int64_t chunk, float *scratch, float *out);
    // One of num_parts; RECUR_COLUMNS of one head, with scratch for as many floats of each key; outputs begin .. end, counted
    // by tokens and the heads that are normed together.
    void (*prepare_part)(const Recurrence &, int64_t part);
    void (*take_tokens)(const Recurrence &, int64_t head, int64_t first, float *scratch);
    void (*gate_outputs)(const Recurrence &, int64_t begin, int64_t end);
    // Channels begin .. end.
    void (*short_conv)(const ShortConvolution &, int64_t begin, int64_t end);
    // Channels begin .. end of all tokens, convolved, to silu of it: rows of `channels` floats.
    void (*silu_conv)(const Convolution &, float *out, int64_t begin, int64_t end);
    // SCAN_CHANNELS channels, or what is left of them, from `first` on. scratch: 2 * dim * SCAN_CHANNELS floats.
    void (*scan)(const Scan &, int64_t first, float *scratch);
};

const Kernels &kernels_portable();
#if defined(EBBTIDE_X86)
const Kernels &kernels_avx2();
const Kernels &kernels_avxvnni();  // products of bytes, four at a time; all else as in avx2, to the bit
const Kernels &kernels_avx512();
const Kernels &kernels_avx512vnni();  // products of bytes, four at a time; all else as in avx512, to the bit
const Kernels &kernels_amx();         // products of bytes by tiles where there are many rows; all else avx512vnni's
#elif defined(EBBTIDE_AARCH64)
const Kernels &kernels_neon();
const Kernels &kernels_neon_dot();  // products of bytes, four at a time; all else as in neon, to the bit
#endif

}  // namespace ebbtide
