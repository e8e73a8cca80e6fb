// The depth-fused part of the Python module: the launchers of mlp_*.h on raw addresses, 0 for what is absent.
// A network and how to launch on it are tuples in the order of Network and MlpLaunch; cuda_backend.py makes them.
#include "mlp/bindings.h"

#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

#include "mlp/adjoint.h"
#include "mlp/exact.h"
#include "mlp/forward.h"
#include "mlp/gradients.h"
#include "mlp/plan.h"
#include "mlp/shape.h"

namespace py = pybind11;

namespace {
using Address = uintptr_t;
using NetworkFields = std::tuple<Address, Address, Address, Address, Address, int, int, bool, int, int, float>;
using LaunchFields = std::tuple<int, int, int, Address>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
float* floats(Address address) { return reinterpret_cast<float*>(address); }

Network<void> network_of(const NetworkFields& fields) {
  const auto& [w1, b1, w2, b2, schedule, hidden, dim, is_heun, activation, norm, epsilon] = fields;
  const auto is_code = [](int code, const auto& names) { return 0 <= code && code < static_cast<int>(std::size(names)); };
  if (!is_code(activation, kActivationNames) || !is_code(norm, kNormNames)) {
    throw std::invalid_argument("mlp: activation and norm must be among activation_codes and norm_codes, got " +
                                std::to_string(activation) + " and " + std::to_string(norm) + "; take the codes from there");
  }
  return {pointer(w1), pointer(b1), pointer(w2),           pointer(b2), floats(schedule), hidden, dim,
          is_heun,     Activation{activation}, Norm{norm}, epsilon};
}

MlpLaunch launch_of(const LaunchFields& fields) {
  const auto& [padded_dim, dtype, groups, stream] = fields;
  return {padded_dim, DType{dtype}, groups, pointer(stream)};
}

void mlp_forward(const NetworkFields& network, const LaunchFields& how, Address x_first, Address x_last, Address increments,
                 Address anchored, int64_t rows, int64_t anchored_rows, int steps, int kept, int anchors) {
  launch_mlp_forward(network_of(network),
                     {floats(x_first), floats(x_last), pointer(increments), floats(anchored), rows, anchored_rows, steps, kept,
                      anchors},
                     launch_of(how));
}

void mlp_adjoint(const NetworkFields& network, const LaunchFields& how, Address x_last, Address g_last, Address x_first,
                 Address g_first, Address kept_newest, Address kept_before, Address carried, Address carries, Address anchored,
                 Address norms, Address us, Address cs, int64_t rows, int64_t anchored_rows, int64_t scratch_rows, int first,
                 int last, int steps, int anchors, int corrections, bool extrapolates, bool reuses) {
  launch_mlp_adjoint(network_of(network),
                     {floats(x_last), floats(g_last), floats(x_first), floats(g_first), pointer(kept_newest),
                      pointer(kept_before), floats(carried), floats(carries), floats(anchored), floats(norms), pointer(us),
                      pointer(cs), rows, anchored_rows, scratch_rows, first, last, steps, anchors, corrections, extrapolates,
                      reuses},
                     launch_of(how));
}

void mlp_exact(const NetworkFields& network, const LaunchFields& how, Address x_first, Address g_last, Address g_first, Address us,
               Address rs, Address cs, int64_t rows, int64_t scratch_rows, int first, int last) {
  launch_mlp_exact(network_of(network),
                   {floats(x_first), floats(g_last), floats(g_first), pointer(us), floats(rs), pointer(cs), rows, scratch_rows,
                    first, last},
                   launch_of(how));
}

void mlp_gradients(const NetworkFields& network, const LaunchFields& how, Address us, Address cs, Address dw1, Address db1,
                   Address dw2, Address db2, int64_t rows, int64_t scratch_rows, int first, int last, bool is_deterministic) {
  launch_mlp_gradients(network_of(network),
                       {pointer(us), pointer(cs), floats(dw1), floats(db1), floats(dw2), floats(db2), rows, scratch_rows, first,
                        last, is_deterministic},
                       launch_of(how));
}

std::pair<int, int> mlp_shape(int padded_dim, int dtype) {
  const MlpPlan plan = plan_mlp(padded_dim, DType{dtype});
  return {plan.chunk, plan.warps};
}

template <class Names>
py::dict codes_of(const Names& names) {
  py::dict codes;
  int code = 0;
  for (const char* name : names) codes[name ? py::object(py::str(name)) : py::none()] = code++;
  return codes;
}
}  // namespace

void define_mlp(py::module_& module) {
  module.attr("activation_codes") = codes_of(kActivationNames);
  module.attr("norm_codes") = codes_of(kNormNames);
  module.attr("mlp_group_rows") = kGroupRows;
  const py::call_guard<py::gil_scoped_release> release;
  module.def("mlp_forward", &mlp_forward, release);
  module.def("mlp_adjoint", &mlp_adjoint, release);
  module.def("mlp_exact", &mlp_exact, release);
  module.def("mlp_gradients", &mlp_gradients, release);
  module.def("mlp_shape", &mlp_shape, "Of a padded dim and a dtype: the chunk that hidden is padded to, and the warps of 16 rows.");
  module.def("mlp_groups", [](int64_t rows, int padded_dim, int dtype) { return mlp_groups(rows, padded_dim, DType{dtype}); },
             "How many groups of 16 rows a block is to take, on the current device.");
}
