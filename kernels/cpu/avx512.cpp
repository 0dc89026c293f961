#define EBBTIDE_NAME "avx512"
#define EBBTIDE_TABLE kernels_avx512
#include "all.h"
