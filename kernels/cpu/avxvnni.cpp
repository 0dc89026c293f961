#define EBBTIDE_NAME "avxvnni"
#define EBBTIDE_TABLE kernels_avxvnni
#include "all.h"
