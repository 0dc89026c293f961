// Rotary position embedding of one head (../turn.py). A product and a sum are rounded apart, as torch rounds them.
#pragma once
#include <cstdint>

namespace ebbtide {

// The first `width` of x's elements; cosines and sines are of one position.
inline void turn_head(float *x, int64_t width, bool is_interleaved, const float *cosines, const float *sines) {
    const int64_t half = width / 2;
    if (is_interleaved) {
        for (int64_t i = 0; i < 2 * half; i += 2) {
            const float a = x[i], b = x[i + 1];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + 1] = b * cosines[i + 1] + a * sines[i + 1];
        }
        return;
    }
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

}  // namespace ebbtide
