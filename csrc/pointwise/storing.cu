// Increments of the residual stream in a few bits, stored and taken back, in one pass:
//     c' = c + Q(x - c), and Q's integers and scales              store
//     x' = x + w (k1 + k2), then the same with x'                 store_step
//     c = c' - q, with q as the other two have packed it          stored_step
// x, k1, k2, x': samples of n values each, one after the other, all in the companion's order in memory; k1 and k2 share x's dtype or a
// narrower one. c, c', and unit, a value a group: fp64 for an fp64 stream, else fp32.
// packed: for each group of 32 values, of which a sample's last may be short, 4 bits bytes; scales: a byte.
// Rounding: products, sums and divisions are rounded one by one, integers to the nearest, ties to even. x' as in forward_step.cu, and it
// is x' as it is stored that c' follows.
// A thread holds four neighbours of each operand in registers, loads before it stores; the eight of a group share its largest
// difference, or the sum, by shuffles. Warps walk over groups with the grid's stride, groups counted in 32 bits, values in 64. Where no
// group is short and all operands are aligned, neighbours are one access (two of fp64), else four. Must match stored.store and
// stored.take_back bit for bit, but for the order in which the magnitudes of one bit's mean are added up.
//
// State: compiled for sm_80 to sm_120 and executed on the host (tests/ops/test_cuda_storing.py). It has not run on a GPU yet.
#include "pointwise/storing.h"

#include "common/arithmetic.h"
#include "common/dispatch_dtype.h"
#include "common/launch.h"
#include "common/pack.h"
#include "common/processors.h"
#include "pointwise/grid.h"
#include "pointwise/increment.h"

namespace {
// Up to 64 registers a thread, and 40 in stored_step_kernel, which has one operand in flight where the other has up to four.
constexpr int kStoreBlocksPerProcessor = 4, kStoredStepBlocksPerProcessor = 6;
constexpr int kGroupsPerBlock = kThreads / kLanesOfGroup;

struct Groups {
  int64_t values;             // of a sample
  uint32_t of_sample, count;  // groups
  bool packs;                 // whether all neighbours are there and one access
};

// A thread's part of a group. Groups after the last are parts of nothing, for all lanes of a warp go on together.
template <bool kPacks>
struct Share {
  uint32_t group;
  int64_t first;     // of its neighbours, in memory
  int lane, values;  // lane of the group; how many values the group has
  bool is_there;

  __device__ __forceinline__ int neighbours() const { return values - lane * kNeighbours; }  // or fewer than 0, or more than there are
};

template <bool kPacks, class Visit>
__device__ __forceinline__ void for_each_share(const Groups& groups, Visit visit) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const int lane = thread % kLanesOfGroup;
  for (uint32_t first = thread / kLanes * (kLanes / kLanesOfGroup); first < groups.count; first += gridDim.x * kGroupsPerBlock) {
    const uint32_t group = first + thread % kLanes / kLanesOfGroup;
    const uint32_t sample = group / groups.of_sample;
    const int64_t in_sample = int64_t{group - sample * groups.of_sample} * kGroup;
    const bool is_there = group < groups.count;
    const int64_t left = is_there ? groups.values - in_sample : 0;
    const int values = left < kGroup ? static_cast<int>(left) : kGroup;
    visit(Share<kPacks>{group, sample * groups.values + in_sample + lane * kNeighbours, lane, values, is_there});
  }
}

// Calls visit(Share<...>{}) for this thread's shares. The two kinds have loops of their own: where they met, the compiler would make
// the accesses of both one by one.
template <class Visit>
__device__ __forceinline__ void for_each_group(const Groups& groups, Visit visit) {
  if (groups.packs) {
    for_each_share<true>(groups, visit);
  } else {
    for_each_share<false>(groups, visit);
  }
}

// Zeros for what is not there.
template <class T, bool kPacks>
__device__ __forceinline__ Pack<T, kNeighbours> load_neighbours(const T* operand, const Share<kPacks>& share) {
  Pack<T, kNeighbours> found{};
  if constexpr (kPacks) {
    if (share.is_there) found = load<kNeighbours>(operand + share.first);
  } else {
#pragma unroll
    for (int i = 0; i < kNeighbours; i++)
      if (i < share.neighbours()) found.values[i] = operand[share.first + i];
  }
  return found;
}

template <class T, bool kPacks>
__device__ __forceinline__ void store_neighbours(T* operand, const Share<kPacks>& share, const Pack<T, kNeighbours>& pack) {
  if constexpr (kPacks) {
    // The place is a whole number of packs: unless it says so, the compiler stores value by value.
    if (share.is_there) store<kNeighbours>(operand + share.first / kNeighbours * kNeighbours, pack);
  } else {
#pragma unroll
    for (int i = 0; i < kNeighbours; i++)
      if (i < share.neighbours()) operand[share.first + i] = pack.values[i];
  }
}

template <class X, class F>
struct Storing {
  const X* x;
  const F* k1;
  const F* k2;
  const Wide<X>* companion;
  const Wide<X>* unit;
  X* x_next;
  Wide<X>* companion_next;
  uint8_t* packed;
  uint8_t* scales;
  Wide<X> weight, largest;
};

// What a group's scale must reach: its mean magnitude, or its largest one in quanta, NaN where one is NaN.
template <int kBits, class Real>
__device__ __forceinline__ Real size_of(const Real (&differences)[kNeighbours], int values) {
  if constexpr (kBits == 1) {
    Real sum = 0;
#pragma unroll
    for (Real difference : differences) sum = add(sum, std::fabs(difference));
    return divide(sum_over_lanes<1, kLanesOfGroup>(sum), static_cast<Real>(values));
  } else {
    constexpr int kLimit = (1 << (kBits - 1)) - 1;
    typename Bits<Real>::type largest = 0;
#pragma unroll
    for (Real difference : differences) {
      const auto bits = to_bits(std::fabs(difference));
      largest = bits > largest ? bits : largest;
    }
    return divide(from_bits<Real>(max_over_lanes<1, kLanesOfGroup>(largest)), static_cast<Real>(kLimit + 0.499));
  }
}

template <int kBits, class X, class F>
__global__ void __launch_bounds__(kThreads, kStoreBlocksPerProcessor) store_kernel(const Storing<X, F> storing, const Groups groups) {
  using Real = Wide<X>;
  for_each_group(groups, [&](const auto& share) {
    auto x = load_neighbours(storing.x, share);
    auto companion = load_neighbours(storing.companion, share);
    const Real unit = share.is_there ? storing.unit[share.group] : Real(1);
    if (storing.k1) {
      const auto k1 = load_neighbours(storing.k1, share);
      Pack<F, kNeighbours> k2{};
      if (storing.k2) k2 = load_neighbours(storing.k2, share);
#pragma unroll
      for (int i = 0; i < kNeighbours; i++) {
        Real k = widen(k1.values[i]);  // exact: k1 and k2 are as narrow as x or narrower
        if (storing.k2) k = add(k, static_cast<Real>(widen(k2.values[i])));
        x.values[i] = narrow<X>(multiply_add(storing.weight, k, widen(x.values[i])));
      }
      store_neighbours(storing.x_next, share, x);
    }

    Real differences[kNeighbours];
    const Real largest = multiply(storing.largest, unit);
#pragma unroll
    for (int i = 0; i < kNeighbours; i++) {
      const Real wanted = widen(x.values[i]), clamped = std::fmin(std::fmax(wanted, -largest), largest);
      // NaN where it is infinite.
      differences[i] = add(add(clamped, -companion.values[i]), multiply(Real(0), wanted));
    }
    const int code = code_of(divide(size_of<kBits>(differences, share.values), unit));
    const Real scale = multiply(scale_of<Real>(code), unit);
    int integers[kNeighbours];
#pragma unroll
    for (int i = 0; i < kNeighbours; i++) {
      Real whole;
      if constexpr (kBits == 1) {
        whole = differences[i] < 0 ? -1 : 1;
        integers[i] = differences[i] < 0 ? 0 : 1;
      } else {  // in range, as the scale was chosen for that
        whole = std::rint(divide(differences[i], scale));
        integers[i] = code == kNaNCode ? 0 : static_cast<int>(whole);
      }
      companion.values[i] = add(companion.values[i], multiply(whole, scale));
    }
    store_neighbours(storing.companion_next, share, companion);
    store_integers<kBits>(storing.packed, share.group, share.lane, share.is_there, integers);
    if (share.is_there && share.lane == 0) storing.scales[share.group] = static_cast<uint8_t>(code);
  });
}

template <int kBits, class Real>
__global__ void __launch_bounds__(kThreads, kStoredStepBlocksPerProcessor)
    stored_step_kernel(const Real* __restrict__ companion, const uint8_t* __restrict__ packed, const uint8_t* __restrict__ scales,
                       const Real* __restrict__ unit, Real* __restrict__ out, const Groups groups) {
  for_each_group(groups, [&](const auto& share) {
    if (!share.is_there) return;
    auto pack = load_neighbours(companion, share);
    int integers[kNeighbours];
    load_integers<kBits>(packed, share.group, share.lane, groups.packs, integers);
    const Real scale = multiply(scale_of<Real>(scales[share.group]), unit[share.group]);
#pragma unroll
    for (int i = 0; i < kNeighbours; i++)
      pack.values[i] = add(pack.values[i], -multiply(static_cast<Real>(integers[i]), scale));
    store_neighbours(out, share, pack);
  });
}

// Calls visit(std::integral_constant<int, bits>{}).
template <class Visit>
void dispatch_bits(const char* op, int bits, Visit visit) {
  switch (bits) {
    case 1: return visit(std::integral_constant<int, 1>{});
    case 2: return visit(std::integral_constant<int, 2>{});
    case 3: return visit(std::integral_constant<int, 3>{});
    case 4: return visit(std::integral_constant<int, 4>{});
    case 6: return visit(std::integral_constant<int, 6>{});
    case 8: return visit(std::integral_constant<int, 8>{});
  }
  throw std::invalid_argument(std::string(op) + ": bits must be 1, 2, 3, 4, 6 or 8, got " + std::to_string(bits));
}

template <class Operands>
Groups groups_of(const Operands& operands, bool aligned) {
  return {operands.values, static_cast<uint32_t>(operands.groups), static_cast<uint32_t>(operands.all_groups),
          aligned && operands.values % kGroup == 0};
}

int64_t blocks_for(int64_t groups, int blocks_per_processor) {
  return std::min(int64_t{blocks_per_processor} * processor_count(), (groups - 1) / kGroupsPerBlock + 1);
}
}  // namespace

void launch_store(const char* op, const StoreOperands& operands) {
  if (operands.all_groups == 0) return;
  dispatch_stream(op, operands.x_dtype, operands.k_dtype, [&](auto x_type, auto k_type) {
    dispatch_bits(op, operands.bits, [&](auto bits) {
      using X = typename decltype(x_type)::type;
      using F = typename decltype(k_type)::type;
      using Real = Wide<X>;
      const Storing<X, F> storing = {static_cast<const X*>(operands.x),
                                     static_cast<const F*>(operands.k1),
                                     static_cast<const F*>(operands.k2),
                                     static_cast<const Real*>(operands.companion),
                                     static_cast<const Real*>(operands.unit),
                                     static_cast<X*>(operands.x_next),
                                     static_cast<Real*>(operands.companion_next),
                                     operands.packed,
                                     operands.scales,
                                     static_cast<Real>(operands.weight),
                                     static_cast<Real>(operands.largest)};
      const bool aligned = aligned_for_packs(
          {operands.x, operands.k1, operands.k2, operands.companion, operands.x_next, operands.companion_next},
          kNeighbours * sizeof(Real));
      launch(op, store_kernel<decltype(bits)::value, X, F>, blocks_for(operands.all_groups, kStoreBlocksPerProcessor), kThreads, 0,
             operands.stream, storing, groups_of(operands, aligned));
    });
  });
}

void launch_stored_step(const StoredStepOperands& operands) {
  const char* op = "stored_step";
  if (operands.all_groups == 0) return;
  dispatch_dtype(op, operands.dtype, [&](auto type) {
    using Real = Wide<typename decltype(type)::type>;
    if constexpr (std::is_same_v<Real, typename decltype(type)::type>) {
      dispatch_bits(op, operands.bits, [&](auto bits) {
        const bool aligned =
            aligned_for_packs({operands.companion, operands.packed, operands.out}, kNeighbours * sizeof(Real));
        launch(op, stored_step_kernel<decltype(bits)::value, Real>,
               blocks_for(operands.all_groups, kStoredStepBlocksPerProcessor), kThreads, 0, operands.stream,
               static_cast<const Real*>(operands.companion), operands.packed, operands.scales,
               static_cast<const Real*>(operands.unit), static_cast<Real*>(operands.out), groups_of(operands, aligned));
      });
    } else {
      throw std::invalid_argument(std::string(op) + ": the companion must be float64 or float32, got " + type.name);
    }
  });
}

std::vector<Kernel> storing_kernels() {
  std::vector<Kernel> kernels;
  for (int bits : {1, 2, 3, 4, 6, 8}) {
    dispatch_bits("", bits, [&](auto constant) {
      constexpr int kBits = decltype(constant)::value;
      const std::string prefix = "<" + std::to_string(kBits) + ", ";
      for_each_stream([&](auto x_type, auto k_type) {
        using X = typename decltype(x_type)::type;
        using F = typename decltype(k_type)::type;
        kernels.push_back({"store_kernel" + prefix + x_type.name + ", " + k_type.name + ">",
                           reinterpret_cast<const void*>(store_kernel<kBits, X, F>), kThreads, 0});
      });
      kernels.push_back({"stored_step_kernel" + prefix + "float64>",
                         reinterpret_cast<const void*>(stored_step_kernel<kBits, double>), kThreads, 0});
      kernels.push_back({"stored_step_kernel" + prefix + "float32>",
                         reinterpret_cast<const void*>(stored_step_kernel<kBits, float>), kThreads, 0});
    });
  }
  return kernels;
}
