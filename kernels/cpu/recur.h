// Rows through a layer that keeps a state of fixed size, for bind_recurrence.cpp, which defines what is said here, and for C++ that
// does more of a layer than this (a decode step).
#pragma once
#include <vector>

#include "bindings.h"

namespace ebbtide {

// A layer's state before the first row, and where the one behind the last row goes, which may be the same: the convolution's last
// inputs, and the matrices, which a short convolution has not.
struct StatePlace {
    const float *inputs, *matrices;
    float *next_inputs, *next_matrices;
};

inline StatePlace state_at(const std::vector<int64_t> &numbers) {
    Reader reader{numbers};
    StatePlace state;
    state.inputs = reader.address<const float>();
    state.matrices = reader.address<const float>();
    state.next_inputs = reader.address<float>();
    state.next_matrices = reader.address<float>();
    return state;
}

// What ../recurrence.py says of a layer, without rows and states. floats: norm_eps, the limits of steps, least_log_decay
// and most_gain.
Convolution read_convolution(Reader &reader);
Recurrence read_recurrence(Reader &reader, const std::vector<double> &floats);

// The same of ../scan.py.
Scan read_scan(Reader &reader);

// `tokens` rows; where they lie and where their outputs go is said already.
void run_rows(Recurrence r, const StatePlace &state, int64_t tokens, int threads);
void run_rows(ShortConvolution s, const StatePlace &state, int64_t tokens, int threads);
void run_rows(Convolution c, const StatePlace &state, int64_t tokens, float *out, int threads);  // with SiLU
void run_rows(Scan s, const StatePlace &state, int64_t tokens, int threads);

}  // namespace ebbtide
