// The CUDA runtime as far as csrc/ calls it: launches are executed before they return, within the limits of a real grid.
#pragma once
#include <cstddef>
#include <iterator>
#include <map>

#include "threads.h"

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorInvalidDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace host {
// Multiprocessors of each device: few, so that small tensors already take more than one stride of a grid, and as many as a large GPU has.
constexpr int kProcessors[] = {1, 132};
inline int device = 0;  // the current one, of all threads
constexpr size_t kSharedWithoutAsking = 48 << 10, kMostShared = 227 << 10;
inline std::map<const void*, size_t> shared_limits;  // of kernels that asked for more
}  // namespace host

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess              ? "cudaSuccess"
         : error == cudaErrorInvalidValue  ? "cudaErrorInvalidValue"
         : error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice"
                                           : "cudaErrorInvalidConfiguration";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorInvalidValue  ? "invalid argument"
         : error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                           : "invalid configuration argument";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(std::size(host::kProcessors))) return cudaErrorInvalidDevice;
  host::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = host::device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = host::kProcessors[device];
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > host::kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(host::launching);
  host::shared_limits[kernel] = bytes;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Parameters... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  size_t limit = host::kSharedWithoutAsking;
  {
    const std::lock_guard<std::mutex> lock(host::launching);
    const auto asked = host::shared_limits.find(reinterpret_cast<const void*>(kernel));
    if (asked != host::shared_limits.end()) limit = std::max(limit, asked->second);
  }
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  host::run_grid(grid, block, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}
