// For aarch64 with dot products of bytes (ARMv8.2): Apple M1, Graviton2, Raspberry Pi 5 and later. To the bit as neon.cpp.
#define EBBTIDE_NAME "neon_dot"
#define EBBTIDE_TABLE kernels_neon_dot
#define EBBTIDE_NEON
#define EBBTIDE_NEON_DOT
#include "all.h"
