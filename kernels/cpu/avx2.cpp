#define EBBTIDE_NAME "avx2"
#define EBBTIDE_TABLE kernels_avx2
#include "all.h"
