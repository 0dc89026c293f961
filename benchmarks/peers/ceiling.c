/* What this machine allows: bytes read and multiply-adds done per second. Built by ceiling.py with the compiler's own
   choice of vectors. */
#include <stddef.h>
#include <stdint.h>

/* The sum of a buffer, in order: nothing but reading. A single stream of addresses is what is fastest. */
uint64_t read_all(const uint64_t *buffer, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) sum += buffer[i];
    return sum;
}

/* 256 independent chains of float32 multiply-adds: two operations for each chain and step. */
float multiply_add(size_t steps, float factor) {
    float chains[256];
    for (int i = 0; i < 256; ++i) chains[i] = (float)i;
    for (size_t s = 0; s < steps; ++s)
        for (int i = 0; i < 256; ++i) chains[i] = chains[i] * factor + 1.0f;
    float sum = 0;
    for (int i = 0; i < 256; ++i) sum += chains[i];
    return sum;
}
