// Sums over the threads of a block.
#pragma once
#include "common/device.h"
#include "pointwise/grid.h"

static_assert(kThreads % kLanes == 0 && kThreads / kLanes <= kLanes, "the warps' sums must fit in one warp");

struct Pair {
  double first, second;
};

// Shared memory that sum_over_block needs.
constexpr size_t kBlockSumBytes = kThreads / kLanes * sizeof(Pair);

// Both sums over the block, for its first warp; other threads get their own warp's. All kThreads threads must come here, once.
__device__ __forceinline__ Pair sum_over_block(Pair mine, void* shared) {
  auto* of_warps = static_cast<Pair*>(shared);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  Pair sum = {sum_over_lanes(mine.first), sum_over_lanes(mine.second)};
  if (lane == 0) of_warps[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < kThreads / kLanes ? of_warps[lane] : Pair{0, 0};
    sum = {sum_over_lanes(sum.first), sum_over_lanes(sum.second)};
  }
  return sum;
}
