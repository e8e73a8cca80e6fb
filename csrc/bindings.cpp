// The Python module resode_cuda._kernels: launches kernels on raw addresses. It knows nothing of torch; allocation, checks, autograd
// and registration are in resode_cuda/ops. An exception of a launcher arrives as RuntimeError or ValueError.
// Operands keep the names and the order of resode_cuda/ops/reference.py; 0 stands for one that is absent.
#include <pybind11/pybind11.h>

#include "common/attributes.h"
#include "pointwise/forward_step.h"
#include "mlp/bindings.h"
#include "pointwise/reverse_update.h"

#ifdef RESODE_HOST
#include "schedule.h"
#endif

namespace py = pybind11;

namespace {
using Address = uintptr_t;  // tensor.data_ptr(), stream.cuda_stream

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void forward_step(Address x, Address f, double h, Address out, int64_t n, int x_dtype, int f_dtype, Address stream) {
  launch_step("forward_step", pointer(x), pointer(f), nullptr, pointer(out), h, n, DType{x_dtype}, DType{f_dtype},
              pointer(stream));
}

void heun_step(Address x, Address k1, Address k2, double h, Address out, int64_t n, int x_dtype, int k_dtype, Address stream) {
  launch_step("heun_step", pointer(x), pointer(k1), pointer(k2), pointer(out), 0.5 * h, n, DType{x_dtype}, DType{k_dtype},
              pointer(stream));
}

void reverse_update_(Address x, Address y, Address k1, Address k2, double weight, Address norms, Address g, Address v1, Address v2,
                     double g_scale, double v_scale, Address partial_norms, int64_t n, int x_dtype, int k_dtype, Address stream) {
  const ReverseOperands operands = {pointer(x), pointer(y),  nullptr,     pointer(k1), pointer(k2), pointer(g), pointer(v1),
                                    pointer(v2), weight, 0, 0, g_scale, v_scale};
  launch_reverse("reverse_update_", operands, pointer(norms), pointer(partial_norms), n, DType{x_dtype}, DType{k_dtype},
                 pointer(stream));
}

void reverse_extrapolate_(Address x, Address y, Address d, Address k1, Address k2, double weight, double a, double b,
                          Address norms, Address g, Address v1, Address v2, double g_scale, double v_scale,
                          Address partial_norms, int64_t n, int x_dtype, int k_dtype, Address stream) {
  const ReverseOperands operands = {pointer(x), pointer(y),  pointer(d),  pointer(k1), pointer(k2), pointer(g), pointer(v1),
                                    pointer(v2), weight, a, b, g_scale, v_scale};
  launch_reverse("reverse_extrapolate_", operands, pointer(norms), pointer(partial_norms), n, DType{x_dtype}, DType{k_dtype},
                 pointer(stream));
}

void adjoint_update_(Address g, Address v1, Address v2, double g_scale, double v_scale, int64_t n, int dtype, Address stream) {
  ReverseOperands operands{};
  operands.g = pointer(g);
  operands.v1 = pointer(v1);
  operands.v2 = pointer(v2);
  operands.g_scale = g_scale;
  operands.v_scale = v_scale;
  launch_adjoint_update(operands, n, DType{dtype}, pointer(stream));
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

  // Arguments go by position: names would cost as much as the rest of a call. A launch can wait for room in the device's queue,
  // so other Python threads go on meanwhile.
  const py::call_guard<py::gil_scoped_release> release;
  module.def("forward_step", &forward_step, release);
  module.def("heun_step", &heun_step, release);
  module.def("reverse_update_", &reverse_update_, release);
  module.def("reverse_extrapolate_", &reverse_extrapolate_, release);
  module.def("adjoint_update_", &adjoint_update_, release);
  define_mlp(module);
  module.def("most_reverse_blocks", &most_reverse_blocks,
             "Blocks of a reverse kernel on the current device, at most; partial_norms needs room for two values of each.");
  module.def("kernel_attributes", &kernel_attributes,
             "For each kernel, on the current device: its name, threads of a block, registers of a thread, bytes of shared memory of "
             "a block and of local memory of a thread, and how many blocks a multiprocessor holds.");
#ifdef RESODE_HOST
  define_host_functions(module);
#endif
}
