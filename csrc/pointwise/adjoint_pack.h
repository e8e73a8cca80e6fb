// The adjoint's part of a backward step, alone or riding in the update of the state.
#pragma once
#include "common/arithmetic.h"
#include "common/pack.h"

// g <- g_scale g + v_scale (v1 + v2): the product with g rounded, then one fused multiply-add for each v that is there.
template <class X>
struct Adjoint {
  X* g;
  const X* v1;
  const X* v2;
  Wide<X> g_scale, v_scale;
};

template <class X, int kValues>
struct AdjointPack {
  Pack<X, kValues> g, v1, v2;
};

template <int kValues, class X>
__device__ __forceinline__ AdjointPack<X, kValues> load_adjoint(const Adjoint<X>& adjoint, int64_t at) {
  return {load<kValues>(adjoint.g + at), load_if_there<kValues>(adjoint.v1, at), load_if_there<kValues>(adjoint.v2, at)};
}

template <class X, int kValues>
__device__ __forceinline__ void update_adjoint(const Adjoint<X>& adjoint, int64_t at, AdjointPack<X, kValues>& pack) {
#pragma unroll
  for (int i = 0; i < kValues; i++) {
    Wide<X> g = multiply(adjoint.g_scale, widen(pack.g.values[i]));
    if (adjoint.v1) g = multiply_add(adjoint.v_scale, widen(pack.v1.values[i]), g);
    if (adjoint.v2) g = multiply_add(adjoint.v_scale, widen(pack.v2.values[i]), g);
    pack.g.values[i] = narrow<X>(g);
  }
  store<kValues>(adjoint.g + at, pack.g);
}
