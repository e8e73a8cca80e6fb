// The CUDA vocabulary that kernels are written in: nvcc's own on a device, the meaning that host.h gives it under RESODE_HOST.
// A kernel file includes this header and never asks which of the two it is compiled for.
#pragma once
#ifdef RESODE_HOST
#include "host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A misaligned vector access faults on a device; only the host has to look for it.
__device__ __forceinline__ void require_alignment(const void*, size_t) {}
#endif
