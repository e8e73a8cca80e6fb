// What a backward step does to the state, the adjoint and the prediction for the step before, in one pass and in place:
//     x <- x - w (k1 + k2),  squares[0] += |y - x|^2,  squares[1] += |x|^2, with the new x     reverse_update_
//     y <- x - (a d' - b d),  d <- d' = w (k1 + k2), with the new x and the old d          reverse_extrapolate_, besides
//     g <- s g + t (v1 + v2)                                                               both, where there is a g
//     g <- s g + t (v1 + v2)                                                               adjoint_update_
// x, y, d, k1, k2, g, v1, v2: n values each, consecutive and in the same order, of x's dtype, but k1 and k2, which share x's or a
// narrower one. What is written overlaps nothing else. k2, g, v1, v2 may be absent (null).
// squares: two fp64 values, whose range holds the squares of every stream.
// Rounding: fp32 for fp32 and 16-bit streams, fp64 for fp64; k1 + k2, products and sums as written, of which a product and the
// sum that takes it are one fused multiply-add. The squares and y take x as it is stored.
// A thread holds one pack of each operand and its two sums of squares (square_sum.h) in registers, loads before it stores, and walks over packs
// with the grid's stride. The warps' sums meet in shared memory; each block adds to the squares once, atomically, or, with
// partial_squares, leaves its sums there ([2, blocks]) for a second kernel, of one block, that adds them in a fixed order.
// Must match reference.reverse_update_, reverse_extrapolate_ and adjoint_update_.
//
// State: compiled for sm_80 to sm_120 and executed on the host (tests/ops/test_cuda_kernels.py). It has not run on a GPU yet.
#include "pointwise/reverse_update.h"

#include "common/arithmetic.h"
#include "common/dispatch_dtype.h"
#include "common/launch.h"
#include "common/pack.h"
#include "common/processors.h"
#include "pointwise/adjoint_pack.h"
#include "pointwise/block_sum.h"
#include "pointwise/grid.h"
#include "pointwise/square_sum.h"

namespace {
// Up to 80 registers a thread; 3 to 8 operands in flight at a time make up for fewer threads.
constexpr int kReverseBlocksPerProcessor = 3;
constexpr int kAdjointBlocksPerProcessor = 6;  // as in forward_step.cu

template <class X, class F>
struct State {
  X* x;
  X* y;  // written if there is a d
  X* d;
  const F* k1;
  const F* k2;
  Wide<X> weight, a, b;
};

template <bool kExtrapolate, class X, class F>
__global__ void __launch_bounds__(kThreads, kReverseBlocksPerProcessor)
    reverse_kernel(const State<X, F> state, const Adjoint<X> adjoint, double* squares, double* partial_squares, int64_t packs,
                   int64_t n) {
  DYN_SHARED(shared);
  SquareSum<Wide<X>> defects, states;
  for_each_pack<kValuesPerPack<X>>(packs, n, [&](auto count, int64_t at) {
    constexpr int kValues = decltype(count)::value;
    auto x = load<kValues>(state.x + at);
    auto y = load<kValues>(state.y + at);
    const auto k1 = load<kValues>(state.k1 + at);
    const auto k2 = load_if_there<kValues>(state.k2, at);
    Pack<X, kValues> d;
    if constexpr (kExtrapolate) d = load<kValues>(state.d + at);
    AdjointPack<X, kValues> g;
    if (adjoint.g) g = load_adjoint<kValues>(adjoint, at);

#pragma unroll
    for (int i = 0; i < kValues; i++) {
      Wide<X> k = widen(k1.values[i]);  // exact: k1 and k2 are as narrow as x or narrower
      if (state.k2) k = add(k, static_cast<Wide<X>>(widen(k2.values[i])));
      x.values[i] = narrow<X>(multiply_add(-state.weight, k, widen(x.values[i])));
      const Wide<X> stored = widen(x.values[i]);
      const Wide<X> defect = add(widen(y.values[i]), -stored);
      defects.add_square(defect);
      states.add_square(stored);
      if constexpr (kExtrapolate) {
        const Wide<X> increment = multiply(state.weight, k);
        const Wide<X> change = multiply_add(-state.a, increment, multiply(state.b, widen(d.values[i])));
        y.values[i] = narrow<X>(add(change, stored));
        d.values[i] = narrow<X>(increment);
      }
    }
    store<kValues>(state.x + at, x);
    if constexpr (kExtrapolate) {
      store<kValues>(state.y + at, y);
      store<kValues>(state.d + at, d);
    }
    if (adjoint.g) update_adjoint(adjoint, at, g);
  });

  const auto sums = sum_over_block({defects.total(), states.total()}, shared);
  if (threadIdx.x == 0) {
    if (partial_squares) {
      partial_squares[blockIdx.x] = sums.first;
      partial_squares[gridDim.x + blockIdx.x] = sums.second;
    } else {
      atomicAdd(squares, sums.first);
      atomicAdd(squares + 1, sums.second);
    }
  }
}

// squares[i] += the sum of partial_squares[i], of shape [2, blocks], in an order that `blocks` alone determines. One block.
__global__ void __launch_bounds__(kThreads)
    add_partial_squares_kernel(const double* partial_squares, double* squares, int64_t blocks) {
  DYN_SHARED(shared);
  Pair mine = {0, 0};
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
    mine.first += partial_squares[block];
    mine.second += partial_squares[blocks + block];
  }
  const auto sums = sum_over_block(mine, shared);
  if (threadIdx.x == 0) {
    squares[0] += sums.first;
    squares[1] += sums.second;
  }
}

template <class X>
__global__ void __launch_bounds__(kThreads, kAdjointBlocksPerProcessor)
    adjoint_update_kernel(const Adjoint<X> adjoint, int64_t packs, int64_t n) {
  for_each_pack<kValuesPerPack<X>>(packs, n, [&](auto count, int64_t at) {
    auto pack = load_adjoint<decltype(count)::value>(adjoint, at);
    update_adjoint(adjoint, at, pack);
  });
}

template <class X, class Operands>
Adjoint<X> adjoint_of(const Operands& operands) {
  return {static_cast<X*>(operands.g), static_cast<const X*>(operands.v1), static_cast<const X*>(operands.v2),
          static_cast<Wide<X>>(operands.g_scale), static_cast<Wide<X>>(operands.v_scale)};
}
}  // namespace

int64_t most_reverse_blocks() { return int64_t{kReverseBlocksPerProcessor} * processor_count(); }

void launch_reverse(const char* op, const ReverseOperands& operands) {
  if (operands.n == 0) return;
  dispatch_stream(op, operands.x_dtype, operands.k_dtype, [&](auto x_type, auto k_type) {
    using X = typename decltype(x_type)::type;
    using F = typename decltype(k_type)::type;
    const auto& [x, y, d, k1, k2, weight, a, b, squares, g, v1, v2, g_scale, v_scale, partial_squares, n, x_dtype, k_dtype,
                 stream] = operands;
    const State<X, F> state = {static_cast<X*>(x),        static_cast<X*>(y),        static_cast<X*>(d),
                               static_cast<const F*>(k1), static_cast<const F*>(k2), static_cast<Wide<X>>(weight),
                               static_cast<Wide<X>>(a),   static_cast<Wide<X>>(b)};
    const GridPlan grid =
        plan_grid(n, kValuesPerPack<X>, aligned_for_packs({x, y, d, k1, k2, g, v1, v2}), most_reverse_blocks());
    auto* total = static_cast<double*>(squares);
    auto* partial = static_cast<double*>(partial_squares);
    launch(op, d ? reverse_kernel<true, X, F> : reverse_kernel<false, X, F>, grid.blocks, kThreads, kBlockSumBytes, stream, state,
           adjoint_of<X>(operands), total, partial, grid.packs, n);
    if (partial) launch(op, add_partial_squares_kernel, 1, kThreads, kBlockSumBytes, stream, partial, total, grid.blocks);
  });
}

void launch_adjoint_update(const AdjointOperands& operands) {
  if (operands.n == 0) return;
  dispatch_dtype("adjoint_update_", operands.dtype, [&](auto x_type) {
    using X = typename decltype(x_type)::type;
    const GridPlan grid = plan_grid(operands.n, kValuesPerPack<X>, aligned_for_packs({operands.g, operands.v1, operands.v2}),
                                    int64_t{kAdjointBlocksPerProcessor} * processor_count());
    launch("adjoint_update_", adjoint_update_kernel<X>, grid.blocks, kThreads, 0, operands.stream, adjoint_of<X>(operands),
           grid.packs, operands.n);
  });
}

std::vector<Kernel> reverse_kernels() {
  std::vector<Kernel> kernels;
  const auto add = [&](const std::string& name, const void* function, size_t shared) {
    kernels.push_back({name, function, kThreads, shared});
  };
  for_each_stream([&](auto x_type, auto k_type) {
    using X = typename decltype(x_type)::type;
    using F = typename decltype(k_type)::type;
    const std::string pair = std::string(x_type.name) + ", " + k_type.name + ">";
    add("reverse_kernel<false, " + pair, reinterpret_cast<const void*>(reverse_kernel<false, X, F>), kBlockSumBytes);
    add("reverse_kernel<true, " + pair, reinterpret_cast<const void*>(reverse_kernel<true, X, F>), kBlockSumBytes);
  });
  for (DType dtype : kDTypes) {
    dispatch_dtype("", dtype, [&](auto x_type) {
      using X = typename decltype(x_type)::type;
      add(std::string("adjoint_update_kernel<") + x_type.name + ">", reinterpret_cast<const void*>(adjoint_update_kernel<X>), 0);
    });
  }
  add("add_partial_squares_kernel", reinterpret_cast<const void*>(add_partial_squares_kernel), kBlockSumBytes);
  return kernels;
}
