#include "attributes.h"

#include "device.h"
#include "forward_step.h"
#include "launch.h"
#include "reverse_update.h"

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> kernels = step_kernels();
  for (Kernel& kernel : reverse_kernels()) kernels.push_back(std::move(kernel));
  return kernels;
}

#ifndef RESODE_HOST  // a host compiler has no registers to tell of
KernelAttributes attributes_of(const Kernel& kernel) {
  const std::string what = "kernel_attributes: " + kernel.name + " was not found";
  cudaFuncAttributes found{};
  check(what, cudaFuncGetAttributes(&found, kernel.function));
  int blocks = 0;
  check(what, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, kernel.shared));
  return {found.numRegs, found.sharedSizeBytes, found.localSizeBytes, blocks};
}
#endif
