#include "attributes.h"

#include "device.h"
#include "forward_step.h"
#include "launch.h"
#include "mlp_adjoint.h"
#include "mlp_exact.h"
#include "mlp_forward.h"
#include "mlp_gradients.h"
#include "reverse_update.h"

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
