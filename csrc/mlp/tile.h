// A row group's 16 rows of states, in registers of its warps, and their norms, for which the warps exchange sums over rows.
//
// Lane 4 r + c of warp w holds columns 8 (w kTiles + t) + 2 c and + 1 of rows r and r + 8, as the sums of a product lie
// (product.h). Columns from dim on are padding, zero; rows beyond the end are zero, too.
#pragma once
#include <iterator>

#include "common/arithmetic.h"
#include "mlp/network.h"
#include "mlp/product.h"
#include "mlp/shape.h"

template <class T>
__device__ __forceinline__ int layers_per_step(const Network<T>& network) {
  return network.is_heun ? 2 : 1;
}

template <int kTiles>
struct Values {
  float of[kTiles][4];
};

// result[i] = make(i-th value of each operand), as in map(make, x, y).
template <class Make, int kTiles, class... Others>
__device__ __forceinline__ Values<kTiles> map(Make make, const Values<kTiles>& first, const Others&... others) {
  Values<kTiles> result;
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
#pragma unroll
    for (int i = 0; i < 4; i++) result.of[t][i] = make(first.of[t][i], others.of[t][i]...);
  }
  return result;
}

static_assert(std::size(kNormNames) == 3, "a norm must have its formulas in Tile::normalize and norm_vjp");

template <class T, int kDim>
struct Tile {
  using Shape = MlpShape<T, kDim>;
  using State = Values<Shape::kTiles>;

  int64_t first_row;  // of the group
  int rows;           // of the group that exist: 16, fewer at the end, none where this is 0 or less
  int dim;
  float inverse_dim;
  int warp;  // of the group
  T* u;      // [16, kDim], in shared memory
  T* c;
  float* row_sums;
  bool is_odd;  // which of the buffers of row_sums is next

  __device__ __forceinline__ int row(int i) const { return threadIdx.x % 32 / 4 + i / 2 * 8; }
  __device__ __forceinline__ int column(int t) const {
    return (warp * Shape::kTiles + t) * kMatrixColumns + threadIdx.x % 4 * 2;
  }
  __device__ __forceinline__ bool is_inside(int t, int i) const {
    return column(t) + i % 2 < dim && row(i) < rows;
  }

  // states: [rows, dim].
  template <class S>
  __device__ __forceinline__ State load(const S* states) const {
    State x;
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        x.of[t][i] = is_inside(t, i) ? widen(states[(first_row + row(i)) * dim + column(t) + i % 2]) : 0;
    }
    return x;
  }
  template <class S>
  __device__ __forceinline__ void store(S* states, const State& x) const {
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (is_inside(t, i)) states[(first_row + row(i)) * dim + column(t) + i % 2] = narrow<S>(x.of[t][i]);
      }
    }
  }

  // Zeroes the padding: rows beyond the end must stay finite, since their cotangents are zero.
  __device__ __forceinline__ State inside(State x) const {
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) x.of[t][i] = is_inside(t, i) ? x.of[t][i] : 0;
    }
    return x;
  }

  // A state in the parameters' dtype, [16, pitch].
  __device__ __forceinline__ void put(T* at, int64_t pitch, const State& x) const {
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) store_pair(at + row(i) * pitch + column(t), x.of[t][i], x.of[t][i + 1]);
    }
  }
  // The same as an operand of products: u or c.
  __device__ __forceinline__ void put(T* operand, const State& x) const { put(operand, Shape::kDimPitch, x); }
  __device__ __forceinline__ State get(const T* at, int64_t pitch) const {
    State x;
#pragma unroll
    for (int t = 0; t < Shape::kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const auto pair = ::load<2>(at + row(i) * pitch + column(t));
        x.of[t][i] = widen(pair.values[0]);
        x.of[t][i + 1] = widen(pair.values[1]);
      }
    }
    return x;
  }

  // The thread's values of a state in memory, [16, kDim], in the parameters' dtype: held until an operand's memory is free.
  struct Ahead {
    Pack<T, 2> of[Shape::kTiles][2];
  };
  __device__ __forceinline__ Ahead get_ahead(const T* at) const {
    Ahead x;
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 2; i++) x.of[i / 2][i % 2] = ::load<2>(at + row(i % 2 * 2) * kDim + column(i / 2));
    return x;
  }
  __device__ __forceinline__ void put(T* operand, const Ahead& x) const {
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 2; i++)
      ::store<2>(operand + row(i % 2 * 2) * Shape::kDimPitch + column(i / 2), x.of[i / 2][i % 2]);
  }

  // Sums of kSums quantities over each row, for all threads that hold values of it: those of row(0), then those of row(2).
  // All threads of the block must come here.
  template <int kSums>
  __device__ __forceinline__ void sum_rows(float (&sums)[2 * kSums]) {
    float* buffer = row_sums + is_odd * Shape::kRowSums / 2;
    is_odd = !is_odd;
#pragma unroll
    for (int i = 0; i < 2 * kSums; i++) {
      sums[i] = sum_over_lanes<1, 4>(sums[i]);
      if (threadIdx.x % 4 == 0) buffer[(warp * kSums + i % kSums) * kGroupRows + row(i / kSums * 2)] = sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kSums; i++) {
      sums[i] = 0;
      for (int w = 0; w < Shape::kWarps; w++) sums[i] += buffer[(w * kSums + i % kSums) * kGroupRows + row(i / kSums * 2)];
    }
  }

  // 1 / sqrt(mean square), by row.
  struct Scales {
    float of[2];
  };

  // x <- u = norm(x). Returns r, zeros without a norm.
  __device__ __forceinline__ Scales normalize(Norm norm, float epsilon, State& x) {
    Scales r = {0, 0};
    if (norm == Norm::kNone) return r;
    if (norm == Norm::kLayer) {
      float means[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < Shape::kTiles * 4; i++) means[i % 4 / 2] += x.of[i / 4][i % 4];
      sum_rows<1>(means);
      for (float& mean : means) mean *= inverse_dim;
#pragma unroll
      for (int i = 0; i < Shape::kTiles * 4; i++)
        x.of[i / 4][i % 4] = column(i / 4) + i % 2 < dim ? x.of[i / 4][i % 4] - means[i % 4 / 2] : 0;
    }
    float squares[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; i++)
      squares[i % 4 / 2] = multiply_add(x.of[i / 4][i % 4], x.of[i / 4][i % 4], squares[i % 4 / 2]);
    sum_rows<1>(squares);
    for (int i = 0; i < 2; i++) r.of[i] = fast_rsqrt(multiply_add(squares[i], inverse_dim, epsilon));
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; i++) x.of[i / 4][i % 4] *= r.of[i % 4 / 2];
    return r;
  }

  // The cotangent of x from du, that of u = norm(x). u is taken from shared memory.
  __device__ __forceinline__ State norm_vjp(Norm norm, const Scales& r, const State& du) {
    if (norm == Norm::kNone) return du;
    const State point = get(u, Shape::kDimPitch);
    float sums[4] = {0, 0, 0, 0};  // over the row: of du u, and of du
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; i++) {
      const float value = du.of[i / 4][i % 4];
      sums[i % 4 / 2 * 2] = multiply_add(value, point.of[i / 4][i % 4], sums[i % 4 / 2 * 2]);
      sums[i % 4 / 2 * 2 + 1] += value;
    }
    sum_rows<2>(sums);
    for (float& sum : sums) sum *= inverse_dim;
    State result;
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; i++) {
      const float along = sums[i % 4 / 2 * 2], mean = norm == Norm::kLayer ? sums[i % 4 / 2 * 2 + 1] : 0;
      const bool is_value = column(i / 4) + i % 2 < dim;
      const float value = du.of[i / 4][i % 4] - mean - point.of[i / 4][i % 4] * along;
      result.of[i / 4][i % 4] = is_value ? value * r.of[i % 4 / 2] : 0;
    }
    return result;
  }
};
