// Starts kernels on one-dimensional grids; what the runtime refuses becomes an exception with cudart's own words.
#pragma once
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device.h"

inline void check(const std::string& what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it: it is reported here, and the next call must not find it
  throw std::runtime_error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// Lets a kernel have more dynamic shared memory than a block gets without asking.
inline void allow_shared(const std::string& op, const void* kernel, size_t shared) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared <= kWithoutAsking) return;
  check(op + ": " + std::to_string(shared) + " bytes of shared memory were refused",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
}

// blocks: in 64 bits, so that a size beyond the grid's limit is an error and never wraps around.
// shared: bytes of dynamic shared memory; stream: a cudaStream_t of the current device, as torch.cuda.Stream.cuda_stream gives it.
template <class... Parameters, class... Arguments>
void launch(const std::string& op, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
            Arguments... arguments) {
  if (blocks > INT_MAX) {
    throw std::runtime_error(op + ": a launch must fit in " + std::to_string(INT_MAX) + " blocks, got " + std::to_string(blocks) +
                             "; split the tensors");
  }
  allow_shared(op, reinterpret_cast<const void*>(kernel), shared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(op + ": the kernel launch failed", cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
