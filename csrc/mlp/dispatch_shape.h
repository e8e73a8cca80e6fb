// From a dtype code and a padded dim, known at run time, to the constants of a depth-fused kernel.
#pragma once
#include <vector>

#include "common/dispatch_dtype.h"
#include "common/kernel.h"
#include "mlp/network.h"
#include "mlp/shape.h"

// Calls visit(MlpShape{}, Type of the parameters).
template <class Visit>
void dispatch_shape(const char* op, DType dtype, int padded_dim, Visit visit) {
  dispatch_dtype(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (std::is_same_v<T, double>) {
      throw std::invalid_argument(std::string(op) + ": parameters must be float32, float16 or bfloat16, got float64; use " +
                                  "backend=\"torch\"");
    } else {
      switch (padded_dim) {
        case 16: return visit(MlpShape<T, 16>{}, type);
        case 32: return visit(MlpShape<T, 32>{}, type);
        case 64: return visit(MlpShape<T, 64>{}, type);
        case 128: return visit(MlpShape<T, 128>{}, type);
      }
      throw std::invalid_argument(std::string(op) + ": the padded dim must be 16, 32, 64 or 128, got " +
                                  std::to_string(padded_dim) + "; pad it, or use backend=\"torch\"");
    }
  });
}

// The kernel of every pair that is served, as describe(MlpShape{}, Type of the parameters) gives it, with the pair added to
// its name.
template <class Describe>
std::vector<Kernel> kernel_of_each_shape(Describe describe) {
  std::vector<Kernel> kernels;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int padded_dim : {16, 32, 64, 128}) {
      dispatch_shape("", dtype, padded_dim, [&](auto shape, auto type) {
        Kernel kernel = describe(shape, type);
        kernel.name += std::string("<") + type.name + ", " + std::to_string(decltype(shape)::kDim) + ">";
        kernels.push_back(kernel);
      });
    }
  }
  return kernels;
}
