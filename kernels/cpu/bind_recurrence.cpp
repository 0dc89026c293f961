// Layers that keep a state of fixed size, for ../recurrence.py and ../scan.py: many tokens in a call, for the former CALL_TOKENS at a
// time, so that what they work on stays small and in the second cache. No bits depend on that.
#include <memory>

#include "attend_layer.h"
#include "recur.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

constexpr int64_t CALL_TOKENS = 64;

int64_t of_call(int64_t tokens) { return tokens < CALL_TOKENS ? tokens : CALL_TOKENS; }

// The calling thread's own, kept from call to call: fresh pages would cost more than a token.
float *scratch_floats(int64_t count) {
    thread_local std::unique_ptr<float[]> kept;
    thread_local int64_t size = 0;
    if (count > size) {
        kept.reset();
        size = 0;  // should there be no room for more
        kept.reset(new float[(size_t)count]);
        size = count;
    }
    return kept.get();
}

// One call's tokens through all three steps.
void run(const Recurrence &r, int threads) {
    const Kernels &kernels = *active;
    const int64_t n = r.conv.tokens, values = r.heads * r.value_dim, matrices = values * r.key_dim;
    share_out(r.num_parts(), 1, n * r.conv.channels * 32, threads, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) kernels.prepare_part(r, part);
    });
    const int64_t blocks = (r.value_dim + RECUR_COLUMNS - 1) / RECUR_COLUMNS;
    const int64_t columns = r.value_dim < RECUR_COLUMNS ? (r.value_dim + 15) / 16 * 16 : RECUR_COLUMNS;
    take_turns(r.heads * blocks, (n + 1) * matrices * 4, r.key_dim * columns, threads, [&](int64_t i, float *scratch) {
        kernels.take_tokens(r, i / blocks, i % blocks * RECUR_COLUMNS, scratch);
    });
    share_out(n * r.heads / r.norm_heads, 1, n * values * 16, threads,
              [&](int64_t begin, int64_t end) { kernels.gate_outputs(r, begin, end); });
}

}  // namespace

Convolution read_convolution(Reader &reader) {
    Convolution c{};
    c.width = reader.number();
    c.channels = reader.number();
    c.taps = reader.address<const float>();
    c.bias = reader.address<const float>();
    if (c.width < 1 || c.width > MAX_CONV_WIDTH) throw std::invalid_argument("conv_width is below 1 or above 16");
    return c;
}

Recurrence read_recurrence(Reader &reader, const std::vector<double> &floats) {
    Recurrence r{};
    r.conv = read_convolution(reader);
    r.heads = reader.number();
    r.key_heads = reader.number();
    r.key_dim = reader.number();
    r.value_dim = reader.number();
    r.norm_heads = reader.number();
    r.is_delta = reader.number();
    r.by_channel = reader.number();
    r.step_bias = reader.address<const float>();
    r.rate = reader.address<const float>();
    r.skip = reader.address<const float>();
    r.norm = reader.address<const float>();
    r.norm_stride = reader.number();
    r.norm_eps = (float)floats.at(0), r.least_step = (float)floats.at(1), r.most_step = (float)floats.at(2);
    r.least_log_decay = (float)floats.at(3), r.most_gain = (float)floats.at(4);
    return r;
}

Scan read_scan(Reader &reader) {
    Scan s{};
    s.channels = reader.number();
    s.dim = reader.number();
    s.rate = reader.address<const float>();
    s.skip = reader.address<const float>();
    return s;
}

void run_rows(Recurrence r, const StatePlace &state, int64_t tokens, int threads) {
    r.conv.before = state.inputs, r.conv.after = state.next_inputs;
    r.before = state.matrices, r.after = state.next_matrices;
    const int64_t most = of_call(tokens);
    const int64_t decays = r.heads * r.decay_dim();
    r.rows = scratch_floats(most * (r.conv.channels + decays + r.heads));
    r.decays = r.rows + most * r.conv.channels;
    r.weights = r.decays + most * decays;
    for (;;) {
        const int64_t n = r.conv.tokens = of_call(tokens);
        run(r, threads);
        tokens -= n;
        if (tokens == 0) return;
        r.conv.inputs += n * r.conv.stride;
        r.steps += n * r.steps_stride;
        if (r.is_delta) r.gains += n * r.gains_stride;
        r.gate += n * r.gate_stride;
        r.out += n * r.heads * r.value_dim;
        r.conv.before = r.conv.after;
        r.before = r.after;
    }
}

void run_rows(ShortConvolution s, const StatePlace &state, int64_t tokens, int threads) {
    constexpr int64_t GRAIN = 64;  // channels
    const int64_t channels = s.conv.channels;
    s.conv.before = state.inputs, s.conv.after = state.next_inputs;
    s.conv.inputs = s.products = scratch_floats(of_call(tokens) * channels);
    s.conv.stride = channels;
    for (;;) {
        const int64_t n = s.conv.tokens = of_call(tokens);
        share_out(channels, GRAIN, n * channels * 32, threads,
                  [&](int64_t begin, int64_t end) { active->short_conv(s, begin, end); });
        tokens -= n;
        if (tokens == 0) return;
        s.mixed += n * s.stride;
        s.out += n * channels;
        s.conv.before = s.conv.after;
    }
}

void run_rows(Convolution c, const StatePlace &state, int64_t tokens, float *out, int threads) {
    constexpr int64_t GRAIN = 64;  // channels
    c.tokens = tokens;
    c.before = state.inputs, c.after = state.next_inputs;
    share_out(c.channels, GRAIN, tokens * c.channels * 32, threads,
              [&](int64_t begin, int64_t end) { active->silu_conv(c, out, begin, end); });
}

void run_rows(Scan s, const StatePlace &state, int64_t tokens, int threads) {
    s.tokens = tokens;
    s.before = state.matrices, s.after = state.next_matrices;
    const int64_t tasks = (s.channels + SCAN_CHANNELS - 1) / SCAN_CHANNELS;
    take_turns(tasks, tokens * s.channels * s.dim * 16, 2 * s.dim * SCAN_CHANNELS, threads,
               [&](int64_t i, float *scratch) { active->scan(s, i * SCAN_CHANNELS, scratch); });
}

namespace {

void recur(const std::vector<int64_t> &layer, const std::vector<double> &floats, const std::vector<int64_t> &state,
           const std::vector<int64_t> &rows, int64_t tokens, uintptr_t out, int threads) {
    Reader reader{layer}, places{rows};
    Recurrence r = read_recurrence(reader, floats);
    r.conv.inputs = places.address<const float>();
    r.conv.stride = places.number();
    r.steps = places.address<const float>();
    r.steps_stride = places.number();
    r.gains = places.address<const float>();
    r.gains_stride = places.number();
    r.gate = places.address<const float>();
    r.gate_stride = places.number();
    r.out = at<float>(out);
    run_rows(r, state_at(state), tokens, threads);
}

void short_conv(const std::vector<int64_t> &layer, const std::vector<int64_t> &state, uintptr_t mixed, int64_t stride,
                int64_t tokens, uintptr_t out, int threads) {
    Reader reader{layer};
    ShortConvolution s{};
    s.conv = read_convolution(reader);
    s.mixed = at<const float>(mixed);
    s.stride = stride;
    s.out = at<float>(out);
    run_rows(s, state_at(state), tokens, threads);
}

void silu_conv(const std::vector<int64_t> &layer, const std::vector<int64_t> &state, uintptr_t inputs, int64_t stride,
               int64_t tokens, uintptr_t out, int threads) {
    Reader reader{layer};
    Convolution c = read_convolution(reader);
    c.inputs = at<const float>(inputs);
    c.stride = stride;
    run_rows(c, state_at(state), tokens, at<float>(out), threads);
}

void scan(const std::vector<int64_t> &numbers, const std::vector<int64_t> &state, const std::vector<int64_t> &rows, int64_t tokens,
          uintptr_t out, int threads) {
    Reader reader{numbers}, places{rows};
    Scan s = read_scan(reader);
    s.x = places.address<const float>();
    s.x_stride = places.number();
    s.steps = places.address<const float>();
    s.steps_stride = places.number();
    s.keys = places.address<const float>();
    s.keys_stride = places.number();
    s.queries = places.address<const float>();
    s.queries_stride = places.number();
    s.gate = places.address<const float>();
    s.gate_stride = places.number();
    s.out = at<float>(out);
    run_rows(s, state_at(state), tokens, threads);
}

}  // namespace

void bind_recurrence(nb::module_ &m) {
    typedef nb::call_guard<nb::gil_scoped_release> Released;
    m.def("recur", &recur, Released());
    m.def("short_conv", &short_conv, Released());
    m.def("silu_conv", &silu_conv, Released());
    m.def("scan", &scan, Released());
}

}  // namespace ebbtide
