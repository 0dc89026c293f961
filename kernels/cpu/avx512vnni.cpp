#define EBBTIDE_NAME "avx512vnni"
#define EBBTIDE_TABLE kernels_avx512vnni
#include "all.h"
