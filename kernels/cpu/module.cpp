// The Python module ebbtide.kernels._cpu.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
    m.doc() = "Ebbtide's CPU kernels. Called through ebbtide.kernels.dispatch alone.";
}
