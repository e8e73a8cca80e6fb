// The Python module resode_cuda._kernels: launches kernels on raw addresses. It knows nothing of torch; allocation, checks, autograd
// and registration are in resode_cuda/ops. An exception of a launcher arrives as RuntimeError, ValueError or TypeError.
// Operands keep the names and the order of resode_cuda/ops/reference.py; 0 stands for one that is absent.
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "common/attributes.h"
#include "common/python_values.h"
#include "mlp/adjoint.h"
#include "mlp/bindings.h"
#include "mlp/exact.h"
#include "mlp/forward.h"
#include "mlp/gradients.h"
#include "pointwise/forward_step.h"
#include "pointwise/reverse_update.h"
#include "pointwise/storing.h"

#ifdef RESODE_HOST
#include "host_functions.h"
#endif

namespace py = pybind11;

namespace {
struct ForwardStep {
  const void* x;
  const void* f;
  double h;
  void* out;
  int64_t n;
  DType x_dtype, f_dtype;
  void* stream;
};

void forward_step(const ForwardStep& given) {
  const auto& [x, f, h, out, n, x_dtype, f_dtype, stream] = given;
  launch_step("forward_step", {x, f, nullptr, h, out, n, x_dtype, f_dtype, stream});
}

void heun_step(const StepOperands& given) {
  StepOperands operands = given;
  operands.weight = 0.5 * given.weight;  // given h
  launch_step("heun_step", operands);
}

struct ReverseUpdate {
  void* x;
  void* y;
  const void* k1;
  const void* k2;
  double weight;
  void* squares;
  void* g;
  const void* v1;
  const void* v2;
  double g_scale, v_scale;
  void* partial_squares;
  int64_t n;
  DType x_dtype, k_dtype;
  void* stream;
};

void reverse_update(const ReverseUpdate& given) {
  const auto& [x, y, k1, k2, weight, squares, g, v1, v2, g_scale, v_scale, partial_squares, n, x_dtype, k_dtype, stream] = given;
  launch_reverse("reverse_update_", {x, y, nullptr, k1, k2, weight, 0, 0, squares, g, v1, v2, g_scale, v_scale, partial_squares, n,
                                     x_dtype, k_dtype, stream});
}

void reverse_extrapolate(const ReverseOperands& given) { launch_reverse("reverse_extrapolate_", given); }

struct Store {
  const void* x;
  const void* companion;
  const void* unit;
  double largest;
  int64_t values, groups, all_groups;
  int bits;
  void* companion_next;
  uint8_t* packed;
  uint8_t* scales;
  DType x_dtype;
  void* stream;
};

void store_increment(const Store& given) {
  const auto& [x, companion, unit, largest, values, groups, all_groups, bits, companion_next, packed, scales, x_dtype, stream] = given;
  launch_store("store", {x, nullptr, nullptr, 0, companion, unit, largest, values, groups, all_groups, bits, nullptr, companion_next,
                         packed, scales, x_dtype, x_dtype, stream});
}

void store_step(const StoreOperands& given) { launch_store("store_step", given); }

template <size_t>
using Argument = py::handle;

template <class Operands, size_t... kFields>
void define(py::module_& module, const char* name, void (*launch)(const Operands&), std::index_sequence<kFields...>) {
  module.def(name, [name, launch](Argument<kFields>... arguments) {
    const Operands operands = {PythonValue{name, arguments}...};
    const py::gil_scoped_release release;  // a launch can wait for room in the device's queue
    launch(operands);
  });
}

// A function of the operands' fields by position: names, or a tuple to unpack, would cost as much as the rest of a call.
template <class Operands>
void define(py::module_& module, const char* name, void (*launch)(const Operands&)) {
  define(module, name, launch, std::make_index_sequence<field_count<Operands>()>());
}

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels = step_kernels();
  for (const auto& more : {reverse_kernels(), storing_kernels(), mlp_forward_kernels(), mlp_adjoint_kernels(), mlp_exact_kernels(),
                           mlp_gradients_kernels()})
    kernels.insert(kernels.end(), more.begin(), more.end());
  return kernels;
}

py::list kernel_attributes() {
  py::list result;
  for (const Kernel& kernel : all_kernels()) {
    py::dict entry;
    entry["name"] = kernel.name;
    entry["threads"] = kernel.threads;
#ifndef RESODE_HOST
    const KernelAttributes found = attributes_of(kernel);
    entry["registers"] = found.registers;
    entry["static_shared"] = found.static_shared;
    entry["dynamic_shared"] = kernel.shared;
    entry["local"] = found.local;
    entry["blocks_per_processor"] = found.blocks_per_processor;
#endif
    result.append(entry);
  }
  return result;
}
}  // namespace

PYBIND11_MODULE(_kernels, module) {
  py::dict dtype_codes;
  for (DType dtype : kDTypes) dtype_codes[name_of(dtype)] = static_cast<int>(dtype);
  module.attr("dtype_codes") = dtype_codes;

  // CMakeLists.txt knows what this was compiled with.
  module.attr("cuda_version") = RESODE_CUDA_VERSION;
  module.attr("architectures") = RESODE_ARCHITECTURES;
  module.attr("compiler") = RESODE_COMPILER;

  define(module, "forward_step", &forward_step);
  define(module, "heun_step", &heun_step);
  define(module, "reverse_update_", &reverse_update);
  define(module, "reverse_extrapolate_", &reverse_extrapolate);
  define(module, "adjoint_update_", &launch_adjoint_update);
  define(module, "store", &store_increment);
  define(module, "store_step", &store_step);
  define(module, "stored_step", &launch_stored_step);
  define_mlp(module);
  module.def("most_reverse_blocks", &most_reverse_blocks,
             "Blocks of a reverse kernel on the current device, at most; partial_squares needs room for two values of each.");
  module.def("kernel_attributes", &kernel_attributes,
             "For each kernel, on the current device: its name, threads of a block, registers of a thread, bytes of shared memory of "
             "a block and of local memory of a thread, and how many blocks a multiprocessor holds.");
#ifdef RESODE_HOST
  define_host_functions(module);
#endif
}
