// Products of matrices in shared memory by one warp, summed in fp32 registers:
//     sums[16, 8 kTiles] += a[16, kDepth] b[kDepth, 8 kTiles]
// 16-bit factors go through the tensor cores; fp32 factors through fused multiply-adds, since those products are to be IEEE's.
// a is stored [16, kDepth] or transposed, [kDepth, 16]; b [8 kTiles, kDepth] or transposed, [kDepth, 8 kTiles]. A row starts a
// pitch after the one before; pitches and the address of the first value are multiples of 16 bytes.
// sums: lane 4 r + c holds columns 8 t + 2 c and + 1 of row r in sums[t][0], [1], and of row r + 8 in sums[t][2], [3].
#pragma once
#include "common/arithmetic.h"
#include "common/device.h"
#include "common/pack.h"
#include "mlp/shape.h"

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    mma_fp16(d, a, b);
  } else {
    mma_bf16(d, a, b);
  }
}

// Two neighbouring values in one access.
template <class T>
__device__ __forceinline__ void store_pair(T* at, float first, float second) {
  if constexpr (std::is_same_v<T, float>) {
    store<2>(at, Pack<float, 2>{{first, second}});
  } else {
    const uint32_t bits = std::is_same_v<T, __half> ? pack_fp16(first, second) : pack_bf16(first, second);
    Pack<T, 2> pair;
    memcpy(&pair, &bits, sizeof bits);
    store<2>(at, pair);
  }
}

template <int kDepth, bool kATransposed, bool kBTransposed, class T, int kTiles>
__device__ __forceinline__ void add_product_of_halves(float (&sums)[kTiles][4], const T* a, int a_pitch, const T* b, int b_pitch) {
  const int matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
  const int high = matrix / 2 * 8, low = matrix % 2 * 8;
  // Fragments of a are ordered by rows first, those of b by depth; lanes from 16 on name the second of two tiles of b.
  const T* a_row = kATransposed ? a + (high + line) * a_pitch + low : a + (low + line) * a_pitch + high;
  const T* b_row = kBTransposed ? b + (low + line) * b_pitch + high : b + (high + line) * b_pitch + low;
  const int b_tile = kMatrixColumns * (kBTransposed ? 1 : b_pitch);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a_fragment[4];
    load_matrices<kATransposed>(a_fragment, a_row + k * (kATransposed ? a_pitch : 1));
    const T* b_here = b_row + k * (kBTransposed ? b_pitch : 1);
    if constexpr (kTiles % 2 == 0) {
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        uint32_t pair[4];
        load_matrices<kBTransposed>(pair, b_here + t * b_tile);
        mma<T>(sums[t], a_fragment, {pair[0], pair[1]});
        mma<T>(sums[t + 1], a_fragment, {pair[2], pair[3]});
      }
    } else {
      static_assert(kTiles == 1);
      uint32_t b_fragment[2];
      load_matrices<kBTransposed>(b_fragment, b_here);
      mma<T>(sums[0], a_fragment, b_fragment);
    }
  }
}

template <int kDepth, bool kATransposed, bool kBTransposed, int kTiles>
__device__ __forceinline__ void add_product_of_floats(float (&sums)[kTiles][4], const float* a, int a_pitch, const float* b,
                                                      int b_pitch) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  [[maybe_unused]] constexpr int kUnrolled = kTiles < 4 ? 2 : 1;  // or mlp_adjoint_kernel<float, 128> spills
#pragma unroll kUnrolled
  for (int k = 0; k < kDepth; k += 4) {
    Pack<float, 4> rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if constexpr (kATransposed) {
        for (int j = 0; j < 4; j++) rows[i].values[j] = a[(k + j) * a_pitch + row + 8 * i];
      } else {
        rows[i] = load<4>(a + (row + 8 * i) * a_pitch + k);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      const int first = t * kMatrixColumns + column;
      Pack<float, 4> columns[2];
      if constexpr (kBTransposed) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const auto pair = load<2>(b + (k + j) * b_pitch + first);
          columns[0].values[j] = pair.values[0];
          columns[1].values[j] = pair.values[1];
        }
      } else {
        columns[0] = load<4>(b + first * b_pitch + k);
        columns[1] = load<4>(b + (first + 1) * b_pitch + k);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          sums[t][i] = multiply_add(rows[i / 2].values[j], columns[i % 2].values[j], sums[t][i]);
      }
    }
  }
}

template <int kDepth, bool kATransposed, bool kBTransposed, class T, int kTiles>
__device__ __forceinline__ void add_product(float (&sums)[kTiles][4], const T* a, int a_pitch, const T* b, int b_pitch) {
  if constexpr (std::is_same_v<T, float>) {
    add_product_of_floats<kDepth, kATransposed, kBTransposed>(sums, a, a_pitch, b, b_pitch);
  } else {
    add_product_of_halves<kDepth, kATransposed, kBTransposed>(sums, a, a_pitch, b, b_pitch);
  }
}
