// For aarch64. Chosen by EBBTIDE_INSTRUCTION_SET=neon alone: no machine of ours has run it but in emulation.
#define EBBTIDE_NAME "neon"
#define EBBTIDE_TABLE kernels_neon
#define EBBTIDE_NEON
#include "all.h"
