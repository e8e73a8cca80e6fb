// The parameters' gradients over a range of layers, from u and c of each layer call as adjoint.cu or exact.cu has stored them:
//     z = W1 u + b1,  a = s(z),  dz = s'(z) W2^T c
//     dW1 += scale dz u^T,  db1 += scale sum dz,  dW2 += scale c a^T,  db2 += scale sum c,  sums over rows
// scale: h of the step, or h/2 with Heun, where an inner layer is called by two steps.
// A block takes a chunk of a layer's hidden dimension over a range of the rows. Its weights stay in shared memory; tiles of rows
// of u and c come by asynchronous copies, one ahead; a and dz are in shared memory, too, in the parameters' dtype. The sums are
// fp32, in registers, that of dW2 transposed, and are added to memory by atomics that nothing waits for. With one range of rows
// their order is fixed.
// Must match RowTile.vjp of resode_cuda/fused/reference/tile.py.
//
// State: compiled for sm_80 to sm_120 and executed on a CPU (tests/fused/test_fused_cuda.py). It has not run on a GPU yet.
#include "mlp/gradients.h"

#include <algorithm>

#include "common/launch.h"
#include "common/processors.h"
#include "mlp/activation.h"
#include "mlp/dispatch_shape.h"
#include "mlp/tile.h"

namespace {
constexpr int kRangesPerProcessor = 4;  // blocks for each multiprocessor, where they may add to the same gradients

template <class Shape>
struct GradientShape {
  static constexpr int kRows = Shape::kIsNarrow ? 32 : 16;
  static constexpr int kWarps = Shape::kIsNarrow && Shape::kDim >= 64 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  // A warp computes these columns of z, and of the gradients 16 rows of the chunk at these columns of dim.
  static constexpr int kHiddenTiles = Shape::kChunk / kMatrixColumns / kWarps;
  static constexpr int kSlices = Shape::kChunk / kGroupRows, kTiles = Shape::kDim / kMatrixColumns * kSlices / kWarps;
  // In values: weights as in a stage; two stages of u and c; a and dz.
  static constexpr int kOperand = kRows * Shape::kDimPitch, kHidden = kRows * Shape::kChunkPitch;
  template <class T>
  static constexpr size_t shared() {
    return (Shape::kStage + 2 * 2 * kOperand + 2 * kHidden) * sizeof(T);
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(GradientShape<MlpShape<T, kDim>>::kThreads, kDim <= 64 ? 2 : 1)
    mlp_gradients_kernel(const Network<T> network, const MlpGradients operands, int64_t range_rows, int ranges) {
  using Shape = MlpShape<T, kDim>;
  using Own = GradientShape<Shape>;
  DYN_SHARED(memory);
  T* const weights = reinterpret_cast<T*>(memory);
  T* const stages = weights + Shape::kStage;
  T* const a = stages + 2 * 2 * Own::kOperand;
  T* const dz = a + Own::kHidden;
  const int chunks = network.hidden / Shape::kChunk;
  const int range = blockIdx.x % ranges, chunk = blockIdx.x / ranges % chunks;
  const int layer = operands.first + blockIdx.x / ranges / chunks;
  const int64_t start = range * range_rows, range_end = start + range_rows;
  const int64_t stop = range_end < operands.rows ? range_end : operands.rows;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const int first_hidden = warp * Own::kHiddenTiles * kMatrixColumns;
  const int slice = warp % Own::kSlices * kGroupRows, first_column = warp / Own::kSlices * Own::kTiles * kMatrixColumns;
  const int64_t unit = int64_t{layer} * network.hidden + chunk * Shape::kChunk;
  constexpr int kInPack = 16 / sizeof(T);

  for (int i = threadIdx.x; i < Shape::kChunk * kDim / kInPack; i += Own::kThreads) {
    constexpr int kPacks = kDim / kInPack, kChunkPacks = Shape::kChunk / kInPack;
    copy_async16(weights + i / kPacks * Shape::kDimPitch + i % kPacks * kInPack, network.w1 + unit * kDim + i * kInPack);
    copy_async16(weights + Shape::kW2 + i / kChunkPacks * Shape::kChunkPitch + i % kChunkPacks * kInPack,
                 network.w2 + (int64_t{layer} * kDim + i / kChunkPacks) * network.hidden + chunk * Shape::kChunk +
                     i % kChunkPacks * kInPack);
  }
  copy_commit();
  // Starts the copies of a tile of u and c. Rows after the last are padding, zero, and so are their products.
  const auto fetch = [&](int stage, int64_t layer_call, int64_t at) {
    T* const to = stages + stage * 2 * Own::kOperand;
    constexpr int kPacks = kDim / kInPack;
    for (int i = threadIdx.x; i < Own::kRows * kPacks; i += Own::kThreads) {
      T* const u = to + i / kPacks * Shape::kDimPitch + i % kPacks * kInPack;
      if (at + i / kPacks < stop) {
        const int64_t from = (layer_call * operands.scratch_rows + at) * kDim + i * kInPack;
        copy_async16(u, static_cast<const T*>(operands.layer_inputs) + from);
        copy_async16(u + Own::kOperand, static_cast<const T*>(operands.cotangents) + from);
      } else {
        store<kInPack>(u, Pack<T, kInPack>{});
        store<kInPack>(u + Own::kOperand, Pack<T, kInPack>{});
      }
    }
    copy_commit();
  };

  float b1[Own::kHiddenTiles][2] = {}, db1[Own::kHiddenTiles][2] = {}, db2 = 0;
  if (network.b1) {
#pragma unroll
    for (int i = 0; i < Own::kHiddenTiles * 2; i++)
      b1[i / 2][i % 2] = widen(network.b1[unit + first_hidden + i / 2 * kMatrixColumns + column + i % 2]);
  }
  const int calls_per_step = layers_per_step(network);
  // With Heun a layer is the first of its own step, and the second of the one before.
  for (int k = 0; k < calls_per_step; k++) {
    const int n = layer - k;
    if (n < operands.first || n >= operands.last) continue;
    const int64_t layer_call = int64_t{n - operands.first} * calls_per_step + k;
    const float h = network.schedule[n].h, scale = network.is_heun ? 0.5f * h : h;
    float part1[Own::kTiles][4] = {}, part2[Own::kTiles][4] = {};
    int stage = 0;
    fetch(0, layer_call, start);
    for (int64_t at = start; at < stop; at += Own::kRows, stage ^= 1) {
      copy_wait<0>();
      __syncthreads();  // the tile has landed, and no thread reads the other stage, a and dz any more
      if (at + Own::kRows < stop) fetch(stage ^ 1, layer_call, at + Own::kRows);
      const T* const u = stages + stage * 2 * Own::kOperand;
      const T* const c = u + Own::kOperand;
      for (int r = 0; r < Own::kRows; r += kGroupRows) {
        float z[Own::kHiddenTiles][4], cotangent[Own::kHiddenTiles][4] = {};
#pragma unroll
        for (int i = 0; i < Own::kHiddenTiles * 4; i++) z[i / 4][i % 4] = b1[i / 4][i % 2];
        add_product<kDim, false, false>(z, u + r * Shape::kDimPitch, Shape::kDimPitch, weights + first_hidden * Shape::kDimPitch,
                                        Shape::kDimPitch);
        add_product<kDim, false, true>(cotangent, c + r * Shape::kDimPitch, Shape::kDimPitch,
                                       weights + Shape::kW2 + first_hidden, Shape::kChunkPitch);
        activate(network.activation, z, cotangent);
#pragma unroll
        for (int i = 0; i < Own::kHiddenTiles * 4; i += 2) {
          const int place = (r + row + i % 4 / 2 * 8) * Shape::kChunkPitch + first_hidden + i / 4 * kMatrixColumns + column;
          store_pair(a + place, z[i / 4][i % 4], z[i / 4][i % 4 + 1]);
          store_pair(dz + place, cotangent[i / 4][i % 4], cotangent[i / 4][i % 4 + 1]);
          for (int j = 0; j < 2; j++) db1[i / 4][j] = multiply_add(scale, cotangent[i / 4][i % 4 + j], db1[i / 4][j]);
        }
      }
      if (operands.db2 && chunk == 0 && threadIdx.x < kDim) {
        for (int r = 0; r < Own::kRows; r++) db2 = multiply_add(scale, widen(c[r * Shape::kDimPitch + threadIdx.x]), db2);
      }
      __syncthreads();
      add_product<Own::kRows, true, true>(part1, dz + slice, Shape::kChunkPitch, u + first_column, Shape::kDimPitch);
      add_product<Own::kRows, true, true>(part2, a + slice, Shape::kChunkPitch, c + first_column, Shape::kDimPitch);
    }
    __syncthreads();  // the next call's first tile goes where the last one may still be read
#pragma unroll
    for (int i = 0; i < Own::kTiles * 4; i++) {
      const int64_t at = (unit + slice + row + i % 4 / 2 * 8) * kDim + first_column + i / 4 * kMatrixColumns + column + i % 2;
      atomicAdd(operands.dw1 + at, scale * part1[i / 4][i % 4]);
      atomicAdd(operands.dw2 + at, scale * part2[i / 4][i % 4]);
    }
  }

  if (operands.db1) {
#pragma unroll
    for (int i = 0; i < Own::kHiddenTiles * 2; i++) {
      const float sum = sum_over_lanes<4>(db1[i / 2][i % 2]);
      if (row == 0) atomicAdd(operands.db1 + unit + first_hidden + i / 2 * kMatrixColumns + column + i % 2, sum);
    }
  }
  if (operands.db2 && chunk == 0 && threadIdx.x < kDim) atomicAdd(operands.db2 + int64_t{layer} * kDim + threadIdx.x, db2);
}
}  // namespace

void launch_mlp_gradients(const Network<void>& network, const MlpGradients& operands, const MlpLaunch& how) {
  if (operands.rows == 0) return;
  dispatch_shape("mlp_gradients", how.dtype, how.padded_dim, [&](auto shape, auto type) {
    using Shape = decltype(shape);
    using Own = GradientShape<Shape>;
    using T = typename decltype(type)::type;
    static_assert(Own::template shared<T>() <= kLeastShared);
    const int64_t tiles = (operands.rows - 1) / Own::kRows + 1;
    const int64_t blocks = int64_t{operands.last - operands.first + network.is_heun} * (network.hidden / Shape::kChunk);
    const int64_t wanted = operands.is_deterministic ? 1 : kRangesPerProcessor * processor_count() / blocks;
    const int64_t range_tiles = (tiles - 1) / std::clamp<int64_t>(wanted, 1, tiles) + 1;
    const int64_t ranges = (tiles - 1) / range_tiles + 1;
    launch("mlp_gradients", mlp_gradients_kernel<T, Shape::kDim>, ranges * blocks, Own::kThreads, Own::template shared<T>(),
           how.stream, typed<T>(network), operands, range_tiles * Own::kRows, static_cast<int>(ranges));
  });
}

std::vector<Kernel> mlp_gradients_kernels() {
  return kernel_of_each_shape([](auto shape, auto type) {
    using Shape = decltype(shape);
    using Own = GradientShape<Shape>;
    using T = typename decltype(type)::type;
    return Kernel{"mlp_gradients_kernel", reinterpret_cast<const void*>(mlp_gradients_kernel<T, Shape::kDim>), Own::kThreads,
                  Own::template shared<T>()};
  });
}
