// The 16-bit types of the host, and conversions that round as a device does: to the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

// The compiler must not contract these into a fused multiply-add either: CMakeLists.txt passes -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kMagnitudeMask = 0x7fffffff, kFloatInfinity = 0x7f800000;

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & kMagnitudeMask) > kFloatInfinity) return {0x7fff};
  // Half a unit in the last kept place, less one where that place is even: ties go to even, and overflow carries into infinity.
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1f, mantissa = value.bits & 0x3ff;
  if (exponent == 0x1f) return float_from_bits(sign | kFloatInfinity | mantissa << 13);
  if (exponent == 0) {  // zero and subnormals, in units of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);  // exponent bias 15 -> 127
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & kMagnitudeMask, sign = bits >> 16 & 0x8000;
  uint32_t result;
  if (magnitude > kFloatInfinity) {
    return {0x7fff};
  } else if (magnitude >= float_bits(65520.0f)) {  // halfway between the largest half and 2^16
    result = 0x7c00;
  } else if (magnitude < float_bits(0x1p-14f)) {  // subnormal: adding 1/2, whose last place is 2^-24, rounds to that grid
    result = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {  // ties to even as above; a carry out of the mantissa raises the exponent
    result = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
  }
  return {static_cast<uint16_t>(sign | result)};
}
