// Layers that keep a state of fixed size, for ../recurrence.py: many tokens in a call, CALL_TOKENS at a time, so that what they
// work on stays small and in the second cache. No bits depend on that.
#include <memory>

#include "attend_layer.h"
#include "bindings.h"

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

// Addresses and sizes, in the order that ../recurrence.py gives.
class Numbers {
public:
    explicit Numbers(const std::vector<int64_t> &all) : all_(all) {}

    int64_t next() {
        if (next_ >= all_.size()) throw std::invalid_argument("these are not a layer's numbers");
        return all_[next_++];
    }
    template <typename T>
    T *address() {
        return at<T>((uintptr_t)next());
    }

private:
    const std::vector<int64_t> &all_;
    size_t next_ = 0;
};

// Width, channels, taps, bias, before, after.
Convolution read_convolution(Numbers &numbers) {
    Convolution c{};
    c.width = numbers.next();
    c.channels = numbers.next();
    c.taps = numbers.address<const float>();
    c.bias = numbers.address<const float>();
    c.before = numbers.address<const float>();
    c.after = numbers.address<float>();
    if (c.width < 1 || c.width > MAX_CONV_WIDTH) throw std::invalid_argument("conv_width is below 1 or above 16");
    return c;
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

void recur(const std::vector<int64_t> &layer, double norm_eps, double least_step, double most_step,
           const std::vector<int64_t> &rows, int64_t tokens, uintptr_t out, int threads) {
    Numbers numbers(layer);
    Recurrence r{};
    r.conv = read_convolution(numbers);
    r.heads = numbers.next();
    r.key_heads = numbers.next();
    r.key_dim = numbers.next();
    r.value_dim = numbers.next();
    r.norm_heads = numbers.next();
    r.is_delta = numbers.next();
    r.step_bias = numbers.address<const float>();
    r.rate = numbers.address<const float>();
    r.skip = numbers.address<const float>();
    r.norm = numbers.address<const float>();
    r.norm_stride = numbers.next();
    r.before = numbers.address<const float>();
    r.after = numbers.address<float>();
    r.norm_eps = (float)norm_eps, r.least_step = (float)least_step, r.most_step = (float)most_step;
    Numbers places(rows);
    r.conv.inputs = places.address<const float>();
    r.conv.stride = places.next();
    r.steps = places.address<const float>();
    r.steps_stride = places.next();
    r.gains = places.address<const float>();
    r.gains_stride = places.next();
    r.gate = places.address<const float>();
    r.gate_stride = places.next();
    r.out = at<float>(out);
    const int64_t most = of_call(tokens);
    r.rows = scratch_floats(most * (r.conv.channels + 2 * r.heads));
    r.decays = r.rows + most * r.conv.channels;
    r.weights = r.decays + most * r.heads;
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

void short_conv(const std::vector<int64_t> &layer, uintptr_t mixed, int64_t stride, int64_t tokens, uintptr_t out, int threads) {
    constexpr int64_t GRAIN = 64;  // channels
    Numbers numbers(layer);
    ShortConvolution s{};
    s.conv = read_convolution(numbers);
    const int64_t channels = s.conv.channels;
    s.mixed = at<const float>(mixed);
    s.stride = stride;
    s.out = at<float>(out);
    s.conv.inputs = s.products = scratch_floats(of_call(tokens) * channels);
    s.conv.stride = channels;
    for (;;) {
        const int64_t n = s.conv.tokens = of_call(tokens);
        share_out(channels, GRAIN, n * channels * 32, threads,
                  [&](int64_t begin, int64_t end) { active->short_conv(s, begin, end); });
        tokens -= n;
        if (tokens == 0) return;
        s.mixed += n * stride;
        s.out += n * channels;
        s.conv.before = s.conv.after;
    }
}

}  // namespace

void bind_recurrence(nb::module_ &m) {
    typedef nb::call_guard<nb::gil_scoped_release> Released;
    m.def("recur", &recur, Released());
    m.def("short_conv", &short_conv, Released());
}

}  // namespace ebbtide
