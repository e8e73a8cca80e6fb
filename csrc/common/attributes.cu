#include "common/attributes.h"

#include "common/device.h"
#include "pointwise/forward_step.h"
#include "common/launch.h"
#include "mlp/adjoint.h"
#include "mlp/exact.h"
#include "mlp/forward.h"
#include "mlp/gradients.h"
#include "pointwise/reverse_update.h"

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels = step_kernels();
  for (const auto& more : {reverse_kernels(), mlp_forward_kernels(), mlp_adjoint_kernels(), mlp_exact_kernels(),
                           mlp_gradients_kernels()})
    kernels.insert(kernels.end(), more.begin(), more.end());
  return kernels;
}

#ifndef RESODE_HOST  // a host compiler has no registers to tell of
KernelAttributes attributes_of(const Kernel& kernel) {
  const std::string what = "kernel_attributes: " + kernel.name + " was not found";
  cudaFuncAttributes found{};
  allow_shared(what, kernel.function, kernel.shared);
  check(what, cudaFuncGetAttributes(&found, kernel.function));
  int blocks = 0;
  check(what, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, kernel.shared));
  return {found.numRegs, found.sharedSizeBytes, found.localSizeBytes, blocks};
}
#endif
