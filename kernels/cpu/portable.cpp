#define EBBTIDE_NAME "portable"
#define EBBTIDE_TABLE kernels_portable
#include "all.h"
