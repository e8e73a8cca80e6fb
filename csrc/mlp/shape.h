// How the depth-fused kernels cut a residual MLP stack into tiles, by the dtype T of its parameters and its padded dim.
// Plain constants, which kernels and launchers share.
//
// A row group is 16 rows, taken through the whole depth by kWarps warps; a block has one group or two, which share the weights.
// The hidden dimension is walked through in chunks: W1 [kChunk, kDim] and W2 [kDim, kChunk] of a chunk, and the biases, are a
// stage of shared memory, of which there are two. Of a product with kChunk columns a warp owns 8 kHiddenTiles, of a state
// 8 kTiles, so that every sum over the hidden dimension stays in one warp's registers.
#pragma once
#include <cstddef>

constexpr int kGroupRows = 16;   // of a row group: those of an mma
constexpr int kMostGroups = 2;   // of a block
constexpr int kMatrixColumns = 8;
constexpr size_t kLeastShared = 99 << 10;  // bytes that a block can have on every GPU from sm_80 on

template <class T, int kPaddedDim>
struct MlpShape {
  using Parameter = T;
  static constexpr int kDim = kPaddedDim;
  static constexpr bool kIsNarrow = sizeof(T) == 2;
  static constexpr int kWarps = kDim == 16 ? 2 : kDim == 32 || !kIsNarrow ? 4 : 8;
  static constexpr int kGroupThreads = 32 * kWarps;
  // As large as kLeastShared allows.
  static constexpr int kChunk = !kIsNarrow && kDim == 128 ? 32 : 64;
  static constexpr int kGroups = kDim < 64 || (kIsNarrow && kDim == 64) ? kMostGroups : 1;
  static constexpr int kMostThreads = kGroups * kGroupThreads;
  static constexpr int kTiles = kDim / kMatrixColumns / kWarps;
  static constexpr int kHiddenTiles = kChunk / kMatrixColumns / kWarps;

  // 16 bytes more than a power of two, so that 8 consecutive rows start in different banks.
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kDimPitch = kDim + kPad, kChunkPitch = kChunk + kPad;

  // Parts of a stage, in values: W1, W2, b1, b2.
  static constexpr int kW2 = kChunk * kDimPitch, kB1 = kW2 + kDim * kChunkPitch, kB2 = kB1 + kChunk, kStage = kB2 + kDim;
  // Operands of a row group, in values: u [16, kDim] and a [16, kChunk]; for a vector-Jacobian product c and dz, too.
  static constexpr int kOperands = kGroupRows * (kDimPitch + kChunkPitch);
  // For a row group, in floats: two buffers of each warp's part of two sums for each row.
  static constexpr int kRowSums = 2 * kWarps * 2 * kGroupRows;

  static constexpr size_t shared(int groups, bool has_vjp) {
    return (2 * kStage + groups * (has_vjp ? 2 : 1) * kOperands) * sizeof(T) + groups * kRowSums * sizeof(float);
  }
};
