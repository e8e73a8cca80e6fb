// The Python module _harness: the kernels of harness.cu, on addresses. Never shipped.
#include <pybind11/pybind11.h>

#include "harness.h"
#include "host_functions.h"

namespace {
void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
}  // namespace

PYBIND11_MODULE(_harness, module) {
  define_host_functions(module);
  module.def("sum", [](int fault, uintptr_t in, uintptr_t out, int64_t blocks, int rounds) {
    launch_sum(Fault{fault}, pointer(in), pointer(out), blocks, rounds);
  });
  module.def("copy", [](int fault, uintptr_t in, uintptr_t out) { launch_copy(Fault{fault}, pointer(in), pointer(out)); });
  module.def("product", [](uintptr_t a, uintptr_t b, uintptr_t d) { launch_product(pointer(a), pointer(b), pointer(d)); });
  module.def("nothing", &launch_nothing);
}
