// The depth-fused part of the Python module: the launchers of csrc/mlp on raw addresses, 0 for what is absent.
// A network, how to launch on it, and a launcher's operands are tuples in the order of Network, MlpLaunch and the structure that
// the launcher takes; resode_cuda/fused/cuda_operands.py has a NamedTuple for each.
#include "mlp/bindings.h"

#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>
#include <string>

#include "common/python_values.h"
#include "mlp/adjoint.h"
#include "mlp/exact.h"
#include "mlp/forward.h"
#include "mlp/gradients.h"
#include "mlp/shape.h"
#include "mlp/shape_query.h"

namespace py = pybind11;

namespace {
Network<void> network_from(const char* where, const py::tuple& fields) {
  const auto network = from_tuple<Network<void>>(where, fields);
  const int activation = static_cast<int>(network.activation), norm = static_cast<int>(network.norm);
  const auto is_code = [](int code, const auto& names) { return 0 <= code && code < static_cast<int>(std::size(names)); };
  if (!is_code(activation, kActivationNames) || !is_code(norm, kNormNames)) {
    throw std::invalid_argument(std::string(where) + ": activation and norm must be among activation_codes and norm_codes, got " +
                                std::to_string(activation) + " and " + std::to_string(norm) + "; take the codes from there");
  }
  return network;
}

template <class Operands>
void define(py::module_& module, const char* name, void (*launch)(const Network<void>&, const Operands&, const MlpLaunch&)) {
  module.def(name, [name, launch](const py::tuple& network_fields, const py::tuple& launch_fields, const py::tuple& fields) {
    const auto network = network_from(name, network_fields);
    const auto how = from_tuple<MlpLaunch>(name, launch_fields);
    const auto operands = from_tuple<Operands>(name, fields);
    const py::gil_scoped_release release;  // a launch can wait for room in the device's queue
    launch(network, operands, how);
  });
}

std::pair<int, int> mlp_shape(int padded_dim, int dtype) {
  const MlpTiles tiles = mlp_tiles(padded_dim, DType{dtype});
  return {tiles.chunk, tiles.warps};
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
  define(module, "mlp_forward", &launch_mlp_forward);
  define(module, "mlp_adjoint", &launch_mlp_adjoint);
  define(module, "mlp_exact", &launch_mlp_exact);
  define(module, "mlp_gradients", &launch_mlp_gradients);
  module.def("mlp_shape", &mlp_shape, "For a padded dim and a dtype: the chunk that hidden is padded to, and the warps of a row group.");
  module.def("mlp_groups", [](int64_t rows, int padded_dim, int dtype) { return mlp_groups(rows, padded_dim, DType{dtype}); },
             "How many groups of 16 rows a block is to take, on the current device.");
}
