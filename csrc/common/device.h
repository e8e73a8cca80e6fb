// The CUDA vocabulary that kernels are written in: nvcc's own on a device, the meaning that tests/support/cuda_host/host.h gives it under
// RESODE_HOST. A kernel file includes this header and never asks which of the two it is compiled for. All PTX is here, and every
// primitive by which the threads of a warp work together, except __syncwarp: kernels call it by CUDA's own name, as they do
// __syncthreads and atomicAdd.
#pragma once
#ifdef RESODE_HOST
#include "host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// The block's dynamic shared memory. Static shared memory would not be poisoned on the host.
#define DYN_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// A misaligned vector access faults on a device; only the host has to look for it.
__device__ __forceinline__ void require_alignment(const void*, size_t) {}

// Asynchronous copies of 16 bytes into shared memory. copy_wait<N> returns when all of this thread's groups but the last N
// committed ones have landed; other threads see them after a barrier.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Computed by the special function units, without the branches that IEEE's rounding takes: 1 / x and 1 / sqrt(x) within 2 units
// in the last place, e^x within 2 + 1.2 |x| of them. 1 / x is 0 from 2^126 on.
__device__ __forceinline__ float fast_reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ float fast_rsqrt(float x) { return rsqrtf(x); }
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }

// Two values in one register, the first in the low half.
template <class Pair>
__device__ __forceinline__ uint32_t bits_of_pair(Pair pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) { return bits_of_pair(__floats2bfloat162_rn(low, high)); }
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) { return bits_of_pair(__floats2half2_rn(low, high)); }

// d[16, 8] += a[16, 16] b[16, 8] by a whole warp: 16-bit factors, fp32 sums; fragments as the PTX ISA lays them out for
// mma.m16n8k16.
#define RESODE_MMA(type)                                                                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { RESODE_MMA("bf16"); }
__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { RESODE_MMA("f16"); }
#undef RESODE_MMA

// Loads 2 or 4 matrices of 8 x 8 16-bit values from shared memory by a whole warp (ldmatrix). Lane 8 i + j gives the address of
// row j of matrix i, 16 bytes. A lane gets two values of each matrix, as a fragment of mma holds them: those of row lane / 4 in
// columns lane % 4 * 2 and + 1, or, transposed, those of column lane / 4 in these rows.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  }
}
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[2], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(out[0]), "=r"(out[1]) : "r"(at) : "memory");
  }
}
#endif

constexpr int kLanes = 32;  // threads of a warp

// A condition, read from memory, that is the same for all threads of a warp. The compiler learns so from this, and keeps what
// depends on it in registers that the warp shares. All lanes must come here.
__device__ __forceinline__ bool same_for_warp(bool condition) { return __any_sync(~0u, condition); }

// The sum over the lanes whose numbers differ in no other bits than those from kFirst up to, but not including, kStop, both
// powers of two. Each of these lanes gets it. By default it is over the warp. All lanes must come here.
template <int kFirst = 1, int kStop = kLanes, class T>
__device__ __forceinline__ T sum_over_lanes(T value) {
#pragma unroll
  for (int bit = kStop / 2; bit >= kFirst; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
  return value;
}

// The largest of these lanes' values.
template <int kFirst = 1, int kStop = kLanes, class T>
__device__ __forceinline__ T max_over_lanes(T value) {
#pragma unroll
  for (int bit = kStop / 2; bit >= kFirst; bit /= 2) {
    const T other = __shfl_xor_sync(~0u, value, bit);
    value = other > value ? other : value;
  }
  return value;
}
