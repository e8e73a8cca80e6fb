// Forward step of the residual stream:
//     out = x + h f
// x, f, out: n values each, dense and in the same order; out has x's dtype; f has x's dtype or a narrower one; out overlaps neither.
// Product and sum are each rounded (no fused multiply-add): fp32 for an fp32 or 16-bit stream, fp64 for an fp64 stream. A
// 16-bit stream is rounded once more, to the stored value.
// Each thread moves as many values as fill 16 bytes of f, every access being 16 bytes; one pass: reads x, f, writes out (3 n
// values). The values after the last whole pack are moved one a thread, and so is everything where a pointer is not aligned.
// Nothing is shared between threads. Must match reference.forward_step, bit for bit in fp32 and fp64.
//
// State: compiled for sm_80 to sm_120 and executed on the host (tests/test_ops.py). It has not run on a GPU yet.
#include "forward_step.h"

#include "arithmetic.h"
#include "dispatch.h"
#include "launch.h"
#include "pack.h"

namespace {
constexpr int kThreads = 256;

template <int kValues, class X, class F>
__global__ void __launch_bounds__(kThreads)
    forward_step_kernel(const X* __restrict__ x, const F* __restrict__ f, X* __restrict__ out, Wide<X> h, int64_t n) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t packs = n / kValues;
  auto step = [h](X x_value, F f_value) {
    const Wide<X> f_wide = widen(f_value);  // exact: F is X or narrower
    return narrow<X>(add(widen(x_value), multiply(h, f_wide)));
  };
  if (thread < packs) {
    const int64_t at = thread * kValues;
    const auto x_pack = load<kValues>(x + at);
    const auto f_pack = load<kValues>(f + at);
    Pack<X, kValues> out_pack;
#pragma unroll
    for (int i = 0; i < kValues; i++) out_pack.values[i] = step(x_pack.values[i], f_pack.values[i]);
    store<kValues>(out + at, out_pack);
  } else if (const int64_t at = packs * kValues + (thread - packs); at < n) {
    out[at] = step(x[at], f[at]);
  }
}

template <int kValues, class X, class F>
void launch_packs(const X* x, const F* f, X* out, double h, int64_t n, void* stream) {
  const int64_t threads = n / kValues + n % kValues;
  launch("forward_step", forward_step_kernel<kValues, X, F>, (threads + kThreads - 1) / kThreads, kThreads, stream, x, f, out,
         static_cast<Wide<X>>(h), n);
}
}  // namespace

void launch_forward_step(const void* x, const void* f, void* out, double h, int64_t n, DType x_dtype, DType f_dtype, void* stream) {
  if (n == 0) return;
  dispatch_stream("forward_step", x_dtype, f_dtype, [&](auto x_type, auto f_type) {
    using X = typename decltype(x_type)::type;
    using F = typename decltype(f_type)::type;
    const auto launch_with = aligned_for_packs(x, f, out) ? launch_packs<kAccessBytes / sizeof(F), X, F> : launch_packs<1, X, F>;
    launch_with(static_cast<const X*>(x), static_cast<const F*>(f), static_cast<X*>(out), h, n, stream);
  });
}
