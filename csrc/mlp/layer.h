// One layer on a row group's tile, and the weights' way into shared memory:
//     f(x) = W2 s(W1 u + b1) + b2,  u = norm(x)
//
// A pass walks through the chunks of the layer's hidden dimension. A chunk's weights have come into one of two stages of shared
// memory by asynchronous copies, which were started a chunk earlier; the last chunk of a pass starts the first one of the next
// pass, which is why each pass takes the next one's layer. Of z = W1 u + b1 a warp computes its slice of the chunk; a = s(z) goes
// to shared memory in the parameters' dtype; of W2 a it computes its own columns. So each chunk takes two barriers, after which
//     first: the chunk has landed, u and c are there, and no thread reads the other stage any more
//     second: a and dz are there
// u and c may be written again after a pass's last barrier, that is, after the pass.
//
// Sums are fp32, in registers, and scaled by h after the product. Must match resode_cuda/fused/reference/tile.py.
#pragma once
#include "mlp/activation.h"
#include "mlp/tile.h"

constexpr int kNoLayer = -1;  // next after the last pass

template <class T, int kDim>
struct Layers {
  using Shape = MlpShape<T, kDim>;
  using State = Values<Shape::kTiles>;
  static_assert(Shape::shared(Shape::kGroups, true) <= kLeastShared);

  const Network<T>& network;
  Tile<T, kDim> tile;
  T* stages;
  T* a;   // [16, kChunk], of the group
  T* dz;
  int stage;  // where the next chunk lands, or has landed

  // memory: Shape::shared(groups, has_vjp) bytes. rows: how many there are of the states in memory.
  __device__ __forceinline__ Layers(const Network<T>& network, unsigned char* memory, bool has_vjp, int64_t rows)
      : network(network), stages(reinterpret_cast<T*>(memory)), stage(0) {
    const int groups = blockDim.x / Shape::kGroupThreads, group = threadIdx.x / Shape::kGroupThreads;
    T* operands = stages + 2 * Shape::kStage + group * (has_vjp ? 2 : 1) * Shape::kOperands;
    auto* row_sums = reinterpret_cast<float*>(stages + 2 * Shape::kStage + groups * (has_vjp ? 2 : 1) * Shape::kOperands);
    tile.first_row = (int64_t{blockIdx.x} * groups + group) * kGroupRows;
    tile.rows = rows - tile.first_row < kGroupRows ? static_cast<int>(rows - tile.first_row) : kGroupRows;
    tile.dim = network.dim;
    tile.inverse_dim = 1.0f / network.dim;
    tile.warp = threadIdx.x % Shape::kGroupThreads / 32;
    tile.u = operands;
    a = operands + kGroupRows * Shape::kDimPitch;
    tile.c = operands + Shape::kOperands;  // c and dz are there only for vector-Jacobian products
    dz = tile.c + kGroupRows * Shape::kDimPitch;
    tile.row_sums = row_sums + group * Shape::kRowSums;
    tile.is_odd = false;
  }

  // Starts the copies of a chunk into the stage.
  __device__ __forceinline__ void fetch(int layer, int chunk) {
    T* to = stages + stage * Shape::kStage;
    const int64_t unit = int64_t{layer} * network.hidden + chunk * Shape::kChunk;
    copy_rows<kDim, Shape::kChunk>(to, Shape::kDimPitch, network.w1 + unit * kDim, kDim);
    copy_rows<Shape::kChunk, kDim>(to + Shape::kW2, Shape::kChunkPitch,
                                   network.w2 + int64_t{layer} * kDim * network.hidden + chunk * Shape::kChunk, network.hidden);
    // b1 by the block's first warp, b2 by its second.
    const int at = threadIdx.x % 32 * kInPack;
    if (threadIdx.x / 32 == 0 && network.b1 && at < Shape::kChunk) copy_async16(to + Shape::kB1 + at, network.b1 + unit + at);
    if (threadIdx.x / 32 == 1 && network.b2 && at < kDim)
      copy_async16(to + Shape::kB2 + at, network.b2 + int64_t{layer} * kDim + at);
    __syncwarp();
    copy_commit();
  }

  // f = W2 s(W1 u + b1) + b2.
  __device__ __forceinline__ State evaluate(int layer, int next) {
    State f{};
    for (int chunk = 0; chunk < network.hidden / Shape::kChunk; chunk++) {
      const T* weights = arrive(layer, chunk, next);
      float z[Shape::kHiddenTiles][4];
      hidden(weights, z);
      activate(network.activation, z);
      put_hidden(a, z);
      __syncthreads();
      add_to_state<false>(f, a, weights + Shape::kW2, Shape::kChunkPitch);
      if (network.b2 && chunk == 0) add_bias_out(weights, f);
    }
    return f;
  }

  // du = W1^T (s'(z) W2^T c), the layer's vector-Jacobian product with c at u, and f, if it is wanted, as above; both share z.
  __device__ __forceinline__ void vjp(int layer, int next, bool wants_f, State& f, State& du) {
    f = du = State{};
    for (int chunk = 0; chunk < network.hidden / Shape::kChunk; chunk++) {
      const T* weights = arrive(layer, chunk, next);
      float z[Shape::kHiddenTiles][4], cotangent[Shape::kHiddenTiles][4] = {};
      hidden(weights, z);
      add_product<kDim, false, true>(cotangent, tile.c, Shape::kDimPitch, weights + Shape::kW2 + first_hidden(),
                                     Shape::kChunkPitch);
      activate(network.activation, z, cotangent);
      if (wants_f) put_hidden(a, z);
      put_hidden(dz, cotangent);
      __syncthreads();
      add_to_state<true>(du, dz, weights, Shape::kDimPitch);
      if (wants_f) {
        add_to_state<false>(f, a, weights + Shape::kW2, Shape::kChunkPitch);
        if (network.b2 && chunk == 0) add_bias_out(weights, f);
      }
    }
  }

 private:
  __device__ __forceinline__ int first_hidden() const { return tile.warp * Shape::kHiddenTiles * kMatrixColumns; }

  static constexpr int kInPack = 16 / sizeof(T);

  // Copies kValues consecutive values of each of kRows rows, by all threads of the block; of two groups each takes every other
  // share. The shares are the same for one group and for two, so constants: computed, their addresses would cost more than the
  // copies.
  template <int kValues, int kRows>
  __device__ __forceinline__ static void copy_rows(T* to, int to_pitch, const T* from, int64_t from_pitch) {
    constexpr int kPacks = kValues / kInPack, kRowsOfShare = Shape::kGroupThreads / kPacks;
    static_assert(Shape::kGroupThreads % kPacks == 0 && kRows % kRowsOfShare == 0);
    const int thread = threadIdx.x % Shape::kGroupThreads, group = threadIdx.x / Shape::kGroupThreads;
    const bool is_alone = blockDim.x == Shape::kGroupThreads;
    to += thread / kPacks * to_pitch + thread % kPacks * kInPack;
    from += thread / kPacks * from_pitch + thread % kPacks * kInPack;
    constexpr int kShares = kRows / kRowsOfShare;
    [[maybe_unused]] constexpr int kUnrolled = kShares > 4 ? 1 : kShares;  // or mlp_adjoint_kernel<float, 128> spills
#pragma unroll kUnrolled
    for (int share = 0; share < kShares; share++, from += kRowsOfShare * from_pitch) {
      if (is_alone || share % kMostGroups == group) copy_async16(to + share * kRowsOfShare * to_pitch, from);
    }
  }

  // Waits for a chunk, whose copies are under way, and starts those of the chunk after it. Returns the stage that it is in.
  __device__ __forceinline__ const T* arrive(int layer, int chunk, int next) {
    copy_wait<0>();
    __syncthreads();
    const T* here = stages + stage * Shape::kStage;
    const bool is_last = (chunk + 1) * Shape::kChunk == network.hidden;
    const int next_layer = is_last ? next : layer, next_chunk = is_last ? 0 : chunk + 1;
    // The same chunk again, a layer's only one, is there already.
    if (next_layer != kNoLayer && (next_layer != layer || next_chunk != chunk)) {
      stage ^= 1;
      fetch(next_layer, next_chunk);
    }
    return here;
  }

  __device__ __forceinline__ void hidden(const T* weights, float (&z)[Shape::kHiddenTiles][4]) const {
#pragma unroll
    for (int t = 0; t < Shape::kHiddenTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        z[t][i] = network.b1 ? widen(weights[Shape::kB1 + first_hidden() + t * kMatrixColumns + threadIdx.x % 4 * 2 + i % 2]) : 0;
    }
    add_product<kDim, false, false>(z, tile.u, Shape::kDimPitch, weights + first_hidden() * Shape::kDimPitch, Shape::kDimPitch);
  }

  __device__ __forceinline__ void put_hidden(T* to, const float (&values)[Shape::kHiddenTiles][4]) const {
#pragma unroll
    for (int t = 0; t < Shape::kHiddenTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        store_pair(to + tile.row(i) * Shape::kChunkPitch + first_hidden() + t * kMatrixColumns + threadIdx.x % 4 * 2, values[t][i],
                   values[t][i + 1]);
    }
  }

  // sums += values w, the warp's columns. w: of W2, or of W1 with the hidden dimension along its rows (kTransposed).
  template <bool kTransposed>
  __device__ __forceinline__ void add_to_state(State& sums, const T* values, const T* w, int pitch) const {
    const int first = tile.warp * Shape::kTiles * kMatrixColumns;
    add_product<Shape::kChunk, false, kTransposed>(sums.of, values, Shape::kChunkPitch, w + first * (kTransposed ? 1 : pitch),
                                                   pitch);
  }

  __device__ __forceinline__ void add_bias_out(const T* weights, State& f) const {
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; i++) f.of[i / 4][i % 4] += widen(weights[Shape::kB2 + tile.column(i / 4) + i % 2]);
  }
};
