// What the host's _kernels offers to tests besides the kernels: the schedule, the device, the plan of a launch, and the kernels of
// harness.cu.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "common/launch.h"
#include "harness.h"
#include "host.h"
#include "pointwise/grid.h"

inline std::pair<int64_t, int64_t> plan_of(int64_t n, int stream_bytes, const std::vector<uintptr_t>& addresses,
                                           int64_t most_blocks) {
  bool aligned = true;
  for (uintptr_t address : addresses) aligned &= aligned_for_packs({reinterpret_cast<const void*>(address)});
  const GridPlan found = plan_grid(n, kAccessBytes / stream_bytes, aligned, most_blocks);
  return {found.packs, found.blocks};
}

inline void define_harness(pybind11::module_& module) {
  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  module.def("harness_sum", [pointer](int fault, uintptr_t in, uintptr_t out, int64_t blocks, int rounds) {
    launch_sum(Fault{fault}, pointer(in), pointer(out), blocks, rounds);
  });
  module.def("harness_copy", [pointer](int fault, uintptr_t in, uintptr_t out) {
    launch_copy(Fault{fault}, pointer(in), pointer(out));
  });
  module.def("harness_product", [pointer](uintptr_t a, uintptr_t b, uintptr_t d) {
    launch_product(pointer(a), pointer(b), pointer(d));
  });
  module.def("harness_nothing", &launch_nothing);
}

inline void define_host_functions(pybind11::module_& module) {
  module.def(
      "host_schedule",
      [](bool greedy, bool copies_late) {
        const std::lock_guard<std::mutex> lock(host::launching);
        host::greedy = greedy;
        host::copies_late = copies_late;
      },
      "The order in which threads move, and when asynchronous copies land; threads.h says what each shows.");
  module.def(
      "host_device", [](int device) { check("there is no such device", cudaSetDevice(device)); },
      "Makes one of the devices of runtime.h, which differ in their multiprocessors, the current one.");
  module.def("plan", &plan_of, "Packs and blocks for n values of that many bytes at these addresses.");
  define_harness(module);
}
