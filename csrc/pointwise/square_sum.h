// A thread's sum of squares, for fp32 values of any size: their squares would leave fp32's range above 1.8e19 and lose digits below
// 1e-19. Three sums, of the values as they are, of 2^-60 and of 2^60 times them, cost fp32 instructions that a kernel which waits for
// memory has to spare, where sums in fp64 would cost many of a GPU with few fp64 units. (After J. L. Blue, A portable Fortran program
// to find the Euclidean norm of a vector, ACM TOMS 4, 1978, whose sums take each value once, by its size.)
#pragma once
#include "common/arithmetic.h"

template <class T>
struct SquareSum;

template <>
struct SquareSum<double> {
  double sum = 0;
  __device__ __forceinline__ void add_square(double value) { sum = multiply_add(value, value, sum); }
  __device__ __forceinline__ double total() const { return sum; }
};

template <>
struct SquareSum<float> {
  float sum = 0, of_large = 0, of_small = 0;
  __device__ __forceinline__ void add_square(float value) {
    constexpr float kShrink = 1.0f / (1ull << 60), kGrow = 1ull << 60;
    const float large = multiply(value, kShrink), small = multiply(value, kGrow);
    sum = multiply_add(value, value, sum);
    of_large = multiply_add(large, large, of_large);
    of_small = multiply_add(small, small, of_small);
  }
  // Where the plain sum is in range, what it lost of small squares is less than its rounding.
  __device__ __forceinline__ double total() const {
    constexpr float kLeast = 1.0f / (1ull << 40) / (1ull << 40), kMost = 3.4028234e38f;
    constexpr double kShrunk = 1.0 / (1ull << 60) / (1ull << 60), kGrown = 1.0 * (1ull << 60) * (1ull << 60);
    if (!(sum <= kMost)) return of_large * kGrown;  // NaN and infinity are there too
    return sum < kLeast ? of_small * kShrunk : sum;
  }
};
