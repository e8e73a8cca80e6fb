// Starts a kernel on a one-dimensional grid and turns a refused launch into an exception with cudart's own words.
#pragma once
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"

// blocks: in 64 bits, so that a size beyond the grid's limit is an error and never wraps around.
// stream: a cudaStream_t of the current device, as torch.cuda.Stream.cuda_stream gives it.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  if (blocks > INT_MAX) {
    throw std::runtime_error(std::string(op) + ": a launch must fit in " + std::to_string(INT_MAX) + " blocks, got " +
                             std::to_string(blocks) + "; split the tensors");
  }
#ifdef RESODE_HOST
  static_cast<void>(stream);
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (blockIdx = {0, 0, 0}; blockIdx.x < gridDim.x; blockIdx.x++)
    for (threadIdx = {0, 0, 0}; threadIdx.x < blockDim.x; threadIdx.x++) kernel(arguments...);
#else
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status != cudaSuccess) {
    cudaGetLastError();  // reported here; leave nothing behind for the next launch to find
    throw std::runtime_error(std::string(op) + ": the kernel launch failed: " + cudaGetErrorString(status) + " (" +
                             cudaGetErrorName(status) + ")");
  }
#endif
}
