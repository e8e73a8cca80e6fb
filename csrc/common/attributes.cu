#include "common/attributes.h"

#include "common/device.h"
#include "common/launch.h"

#ifndef RESODE_HOST  // a host compiler does not report registers
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
