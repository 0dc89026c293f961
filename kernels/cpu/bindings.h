// What the files that offer kernels to Python share. Tensors come as addresses: crossing by DLPack costs 2 microseconds
// for each, and a decode step makes hundreds of calls.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

#include "kernels.h"

namespace ebbtide {

extern const Kernels *active;  // the instruction set in use

template <typename T>
T *at(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

void bind_matmul(nanobind::module_ &m);

}  // namespace ebbtide
