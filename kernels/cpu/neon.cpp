// For aarch64, all of which has NEON. No machine of ours has run it but in emulation, where `make neon` compares its bits.
#define EBBTIDE_NAME "neon"
#define EBBTIDE_TABLE kernels_neon
#define EBBTIDE_NEON
#include "all.h"
