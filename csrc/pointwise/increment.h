// An increment in a few bits, as resode_cuda/stored.py specifies it: 32 neighbours, a group, share a scale of 8 bits, in units.
// A thread holds four neighbours and eight threads a group, so that a warp has four groups.
#pragma once
#include "common/arithmetic.h"
#include "common/pack.h"

constexpr int kGroup = 32, kNeighbours = 4, kLanesOfGroup = kGroup / kNeighbours;
constexpr int kNaNCode = 255;  // of a group with a value that is not finite

// A number's bits as an unsigned integer. Those of numbers that are not negative have the numbers' order, with NaN above all.
template <class Real>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr int kMantissa = 23, kOne = 127;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr int kMantissa = 52, kOne = 1023;
};
template <class Real>
__device__ __forceinline__ typename Bits<Real>::type to_bits(Real value) {
  typename Bits<Real>::type bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <class Real>
__device__ __forceinline__ Real from_bits(typename Bits<Real>::type bits) {
  Real value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Scale of a code, in units: ceil((1 + m/8) 2^e) with e and m the code's upper five bits and lower three, so that the code is where a
// floating-point number has exponent and mantissa.
template <class Real>
__device__ __forceinline__ Real scale_of(int code) {
  using Integer = typename Bits<Real>::type;
  if (code == kNaNCode) return NAN;
  return std::ceil(from_bits<Real>(Integer(code + 8 * Bits<Real>::kOne) << (Bits<Real>::kMantissa - 3)));
}

// Code of the smallest scale that is at least `size`, in units; that of NaN where there is none.
// ceil(s) >= size means s > ceil(size) - 1: it is the code after that number's, rounded down. Sizes that are too large to have 1
// subtracted have scales without fractions, and take the number before them.
template <class Real>
__device__ __forceinline__ int code_of(Real size) {
  constexpr Real kLargestScale = 7.0 * (1 << 29);  // that of code 254
  if (!(size <= kLargestScale)) return kNaNCode;
  if (size <= 1) return 0;
  const Real whole = std::ceil(size);
  const auto below = to_bits(add(whole, Real(-1))), before = to_bits(whole) - 1;
  return static_cast<int>((below < before ? below : before) >> (Bits<Real>::kMantissa - 3)) - 8 * Bits<Real>::kOne + 1;
}

// Values are packed in one part or two, whose widths divide 8, from their low bits up.
template <int kBits>
constexpr int kLowWidth = kBits == 3 ? 2 : kBits == 6 ? 4 : kBits;

// Bytes of a part that a thread's neighbours fill, or share with the next thread's.
template <int kWidth>
constexpr int kPartBytes = kWidth == 1 ? 1 : kNeighbours * kWidth / 8;

// Where a thread finds its bytes of a part of width kWidth that starts at bit kShift. lane: of the group.
template <int kBits, int kShift, int kWidth, class Byte>
__device__ __forceinline__ Byte* part_of(Byte* packed, int64_t group, int lane) {
  return packed + group * (4 * kBits) + 4 * kShift + lane * kWidth / 2;
}

// Stores a part of the thread's integers. All lanes of a warp must come here; is_there: whether the group is.
template <int kBits, int kShift, int kWidth>
__device__ __forceinline__ void store_part(uint8_t* packed, int64_t group, int lane, bool is_there,
                                           const int (&integers)[kNeighbours]) {
  uint32_t joined = 0;
#pragma unroll
  for (int i = 0; i < kNeighbours; i++) joined |= (integers[i] >> kShift & ((1 << kWidth) - 1)) << i * kWidth;
  if constexpr (kWidth == 1) {
    joined |= __shfl_xor_sync(~0u, joined, 1) << kNeighbours;
    is_there = is_there && lane % 2 == 0;
  }
  if (!is_there) return;
  Pack<uint8_t, kPartBytes<kWidth>> bytes;
#pragma unroll
  for (int i = 0; i < kPartBytes<kWidth>; i++) bytes.values[i] = static_cast<uint8_t>(joined >> 8 * i);
  store<kPartBytes<kWidth>>(part_of<kBits, kShift, kWidth>(packed, group, lane), bytes);
}

template <int kBits>
__device__ __forceinline__ void store_integers(uint8_t* packed, int64_t group, int lane, bool is_there,
                                               const int (&integers)[kNeighbours]) {
  constexpr int kLow = kLowWidth<kBits>;
  store_part<kBits, 0, kLow>(packed, group, lane, is_there, integers);
  if constexpr (kLow < kBits) store_part<kBits, kLow, kBits - kLow>(packed, group, lane, is_there, integers);
}

// Adds a part's bits to the thread's integers. aligned: whether packed lies so that a thread's bytes are one access.
template <int kBits, int kShift, int kWidth>
__device__ __forceinline__ void load_part(const uint8_t* packed, int64_t group, int lane, bool aligned,
                                          uint32_t (&integers)[kNeighbours]) {
  const uint8_t* at = part_of<kBits, kShift, kWidth>(packed, group, lane);
  uint32_t joined = 0;
  Pack<uint8_t, kPartBytes<kWidth>> bytes;
  if (aligned) {
    bytes = load<kPartBytes<kWidth>>(at);
  } else {
#pragma unroll
    for (int i = 0; i < kPartBytes<kWidth>; i++) bytes.values[i] = at[i];
  }
#pragma unroll
  for (int i = 0; i < kPartBytes<kWidth>; i++) joined |= uint32_t{bytes.values[i]} << 8 * i;
  if constexpr (kWidth == 1) joined >>= lane % 2 * kNeighbours;
#pragma unroll
  for (int i = 0; i < kNeighbours; i++) integers[i] |= (joined >> i * kWidth & ((1 << kWidth) - 1)) << kShift;
}

// The thread's integers of a group that is there.
template <int kBits>
__device__ __forceinline__ void load_integers(const uint8_t* packed, int64_t group, int lane, bool aligned,
                                              int (&integers)[kNeighbours]) {
  constexpr int kLow = kLowWidth<kBits>;
  uint32_t unsigned_ones[kNeighbours] = {};
  load_part<kBits, 0, kLow>(packed, group, lane, aligned, unsigned_ones);
  if constexpr (kLow < kBits) load_part<kBits, kLow, kBits - kLow>(packed, group, lane, aligned, unsigned_ones);
#pragma unroll
  for (int i = 0; i < kNeighbours; i++) {
    const uint32_t bits = unsigned_ones[i];
    // With more than one bit the sign bit goes to the top and back.
    integers[i] = kBits == 1 ? static_cast<int>(2 * bits) - 1 : static_cast<int>(bits << (32 - kBits)) >> (32 - kBits);
  }
}
