// The Python module resode_cuda._kernels: launches kernels on raw addresses. It knows nothing of torch; allocation, checks, autograd
// and registration are in resode_cuda/ops. An exception of a launcher arrives as RuntimeError or ValueError.
#include <pybind11/pybind11.h>

#include "forward_step.h"

namespace py = pybind11;

namespace {
using Address = uintptr_t;  // tensor.data_ptr(), stream.cuda_stream

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void forward_step(Address x, Address f, Address out, double h, int64_t n, int x_dtype, int f_dtype, Address stream) {
  launch_forward_step(pointer(x), pointer(f), pointer(out), h, n, DType{x_dtype}, DType{f_dtype}, pointer(stream));
}
}  // namespace

PYBIND11_MODULE(_kernels, module) {
  // Named as torch names its dtypes.
  py::dict dtype_codes;
  dtype_codes["float64"] = static_cast<int>(DType::kFloat64);
  dtype_codes["float32"] = static_cast<int>(DType::kFloat32);
  dtype_codes["float16"] = static_cast<int>(DType::kFloat16);
  dtype_codes["bfloat16"] = static_cast<int>(DType::kBFloat16);
  module.attr("dtype_codes") = dtype_codes;

  // CMakeLists.txt knows what this was compiled with.
  module.attr("cuda_version") = RESODE_CUDA_VERSION;
  module.attr("architectures") = RESODE_ARCHITECTURES;
  module.attr("compiler") = RESODE_COMPILER;

  // A launch can wait for room in the device's queue, so other Python threads go on meanwhile.
  using py::arg;
  module.def("forward_step", &forward_step, arg("x"), arg("f"), arg("out"), arg("h"), arg("n"), arg("x_dtype"), arg("f_dtype"),
             arg("stream"), py::call_guard<py::gil_scoped_release>());
}
