// Steps of the residual stream, forward and (with negative weight) back:
//     out = x + w (k1 + k2)      forward_step: w = h, no k2;  heun_step: w = h/2
// x, k1, k2, out: n values each, consecutive and in the same order; out has x's dtype, k1 and k2 share x's or a narrower one;
// out overlaps none of them.
// The sum is rounded, then one fused multiply-add: in fp32 for an fp32 or 16-bit stream, in fp64 for an fp64 stream. A 16-bit
// stream is rounded once more, to the stored value.
// A thread holds one pack of each operand in registers; nothing is shared. One pass: reads x, k1, k2, writes out (3 or 4 n
// values). Must match reference.forward_step and reference.heun_step, bit for bit in fp32 and fp64.
//
// State: compiled for sm_80 to sm_120 and executed on the host (tests/ops/test_cuda_kernels.py). It has not run on a GPU yet.
#include "pointwise/forward_step.h"

#include "common/arithmetic.h"
#include "common/dispatch_dtype.h"
#include "common/launch.h"
#include "common/pack.h"
#include "common/processors.h"
#include "pointwise/grid.h"

namespace {
// 1536 threads, 2 or 3 loads of 16 bytes each: 48 KB or more in flight, where a multiprocessor of an H100 needs some 18 KB (its
// share of 3.35 TB/s during 0.7 us). More blocks would leave 32 registers, too few on sm_100; on sm_120 the 40 that six blocks
// leave are already a few short, and three of the kernels spill.
constexpr int kBlocksPerProcessor = 6;

template <class X, class F>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    step_kernel(const X* __restrict__ x, const F* __restrict__ k1, const F* __restrict__ k2, X* __restrict__ out, Wide<X> weight,
                int64_t packs, int64_t n) {
  for_each_pack<kValuesPerPack<X>>(packs, n, [=](auto count, int64_t at) {
    constexpr int kValues = decltype(count)::value;
    const auto x_pack = load<kValues>(x + at);
    const auto k1_pack = load<kValues>(k1 + at);
    const auto k2_pack = load_if_there<kValues>(k2, at);
    Pack<X, kValues> out_pack;
#pragma unroll
    for (int i = 0; i < kValues; i++) {
      Wide<X> k = widen(k1_pack.values[i]);  // exact: k1 and k2 are as narrow as x or narrower
      if (k2) k = add(k, static_cast<Wide<X>>(widen(k2_pack.values[i])));
      out_pack.values[i] = narrow<X>(multiply_add(weight, k, widen(x_pack.values[i])));
    }
    store<kValues>(out + at, out_pack);
  });
}
}  // namespace

void launch_step(const char* op, const StepOperands& operands) {
  if (operands.n == 0) return;
  dispatch_stream(op, operands.x_dtype, operands.k_dtype, [&](auto x_type, auto k_type) {
    using X = typename decltype(x_type)::type;
    using F = typename decltype(k_type)::type;
    const auto& [x, k1, k2, weight, out, n, x_dtype, k_dtype, stream] = operands;
    const GridPlan grid = plan_grid(n, kValuesPerPack<X>, aligned_for_packs({x, k1, k2, out}),
                                    int64_t{kBlocksPerProcessor} * processor_count());
    launch(op, step_kernel<X, F>, grid.blocks, kThreads, 0, stream, static_cast<const X*>(x), static_cast<const F*>(k1),
           static_cast<const F*>(k2), static_cast<X*>(out), static_cast<Wide<X>>(weight), grid.packs, n);
  });
}

std::vector<Kernel> step_kernels() {
  std::vector<Kernel> kernels;
  for_each_stream([&](auto x_type, auto k_type) {
    using X = typename decltype(x_type)::type;
    using F = typename decltype(k_type)::type;
    kernels.push_back({std::string("step_kernel<") + x_type.name + ", " + k_type.name + ">",
                       reinterpret_cast<const void*>(step_kernel<X, F>), kThreads, 0});
  });
  return kernels;
}
