// Kernels that test the host's execution itself. Faults are deliberate, and chosen at compile time as in a real kernel; nvcc
// compiles this file too, so that what the host is asked to imitate is CUDA.
#include "harness.h"

#include "common/device.h"
#include "common/launch.h"

namespace {
constexpr int kBlock = 128;

template <Fault kFault>
__device__ __forceinline__ void barrier_unless(Fault here) {
  if (kFault != here) __syncthreads();
}

// out[block, thread] = the sum of in[block, 0 .. rounds * threads), kBlock values at a time through shared memory.
template <Fault kFault>
__global__ void sum_kernel(const float* in, float* out, int rounds) {
  DYN_SHARED(memory);
  auto* values = reinterpret_cast<float*>(memory);
  const int thread = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < rounds; round++) {
    values[thread] = in[(blockIdx.x * rounds + round) * kBlock + thread];
    barrier_unless<kFault>(Fault::kReadsTooEarly);
    for (int i = 0; i < kBlock; i++) sum += values[i];
    barrier_unless<kFault>(Fault::kOverwritesTooEarly);
  }
  if constexpr (kFault == Fault::kDivergentBarrier) {
    if (thread < kBlock / 2) __syncthreads();
  }
  out[blockIdx.x * kBlock + thread] = sum;
}

// out[thread] = in[source(thread)] by a copy into shared memory; each thread reads what its neighbour copied.
template <Fault kFault>
__global__ void copy_kernel(const float4* in, float4* out) {
  DYN_SHARED(memory);
  auto* values = reinterpret_cast<float4*>(memory);
  const int thread = threadIdx.x;
  copy_async16(values + thread, in + thread);
  copy_commit();
  copy_async16(values + kBlock + thread, in + kBlock + thread);
  copy_commit();
  if constexpr (kFault != Fault::kForgetsToWait) copy_wait<1>();
  __syncthreads();
  out[thread] = values[(thread + 1) % kBlock];
  copy_wait<0>();
  __syncthreads();
  out[kBlock + thread] = values[kBlock + (thread + 1) % kBlock];
}

// d[16, 8] = a[16, 16] b[16, 8], row-major, by one warp.
__global__ void product_kernel(const float* a, const float* b, float* d) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; i++) {
    const float* at = a + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
    a_fragment[i] = pack_bf16(at[0], at[1]);
  }
  for (int i = 0; i < 2; i++) {
    const float* at = b + (column + i * 8) * 8 + row;
    b_fragment[i] = pack_bf16(at[0], at[8]);
  }
  float sums[4] = {};
  mma_bf16(sums, a_fragment, b_fragment);
  for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + column + i % 2] = sums[i];
}

__global__ void nothing_kernel() {}

template <Fault kFault>
void launch_sum_with(const void* in, void* out, int64_t blocks, int rounds) {
  const auto* floats = static_cast<const float*>(in);
  launch("sum", sum_kernel<kFault>, blocks, kBlock, kBlock * sizeof(float), nullptr, floats, static_cast<float*>(out), rounds);
}
}  // namespace

void launch_sum(Fault fault, const void* in, void* out, int64_t blocks, int rounds) {
  switch (fault) {
    case Fault::kReadsTooEarly: return launch_sum_with<Fault::kReadsTooEarly>(in, out, blocks, rounds);
    case Fault::kOverwritesTooEarly: return launch_sum_with<Fault::kOverwritesTooEarly>(in, out, blocks, rounds);
    case Fault::kDivergentBarrier: return launch_sum_with<Fault::kDivergentBarrier>(in, out, blocks, rounds);
    default: return launch_sum_with<Fault::kNone>(in, out, blocks, rounds);
  }
}

void launch_copy(Fault fault, const void* in, void* out) {
  launch("copy", fault == Fault::kForgetsToWait ? copy_kernel<Fault::kForgetsToWait> : copy_kernel<Fault::kNone>, 1, kBlock,
         2 * kBlock * sizeof(float4), nullptr, static_cast<const float4*>(in), static_cast<float4*>(out));
}

void launch_product(const void* a, const void* b, void* d) {
  launch("product", product_kernel, 1, 32, 0, nullptr, static_cast<const float*>(a), static_cast<const float*>(b),
         static_cast<float*>(d));
}

void launch_nothing(int64_t blocks, int threads, size_t shared) {
  launch("nothing", nothing_kernel, blocks, threads, shared, nullptr);
}
