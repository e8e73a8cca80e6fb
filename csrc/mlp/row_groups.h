// How a kernel that takes row groups through the depth is launched, and listed for every dtype and padded dim.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/kernel.h"
#include "common/launch.h"
#include "mlp/dispatch_shape.h"
#include "mlp/network.h"

template <class KernelOf>
struct RowGroupKernel {
  const char* op;      // the kernel's name is this and _kernel
  bool has_vjp;        // whether it computes vector-Jacobian products
  KernelOf kernel_of;  // the kernel for a MlpShape{}; it takes a Network and the op's operands

  // operands.rows: how many rows there are of the states.
  template <class Operands>
  void launch(const Network<void>& network, const Operands& operands, const MlpLaunch& how) const {
    if (operands.rows == 0) return;
    dispatch_shape(op, how.dtype, how.padded_dim, [&](auto shape, auto) {
      using Shape = decltype(shape);
      const int64_t blocks = (operands.rows - 1) / (how.groups * kGroupRows) + 1;
      ::launch(op, kernel_of(shape), blocks, how.groups * Shape::kGroupThreads, Shape::shared(how.groups, has_vjp),
               how.stream, typed<typename Shape::Parameter>(network), operands);
    });
  }

  // With one group to a block.
  std::vector<Kernel> kernels() const {
    return kernel_of_each_shape([&](auto shape, auto) {
      using Shape = decltype(shape);
      return Kernel{std::string(op) + "_kernel", reinterpret_cast<const void*>(kernel_of(shape)), Shape::kGroupThreads,
                    Shape::shared(1, has_vjp)};
    });
  }
};

template <class KernelOf>
RowGroupKernel(const char*, bool, KernelOf) -> RowGroupKernel<KernelOf>;
