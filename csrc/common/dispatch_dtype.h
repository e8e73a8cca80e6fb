// From dtype codes, known at run time, to types, known to the compiler. What is not served is an error, never a silent return.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/device.h"
#include "common/dtype_codes.h"

template <class T, DType kDType>
struct Type {
  using type = T;
  static constexpr const char* name = name_of(kDType);
};

// Calls visit(Type{}) for the type that the code stands for.
template <class Visit>
void dispatch_dtype(const char* op, DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat64: return visit(Type<double, DType::kFloat64>{});
    case DType::kFloat32: return visit(Type<float, DType::kFloat32>{});
    case DType::kFloat16: return visit(Type<__half, DType::kFloat16>{});
    case DType::kBFloat16: return visit(Type<__nv_bfloat16, DType::kBFloat16>{});
  }
  throw std::invalid_argument(std::string(op) + ": a dtype must be one of dtype_codes, got " +
                              std::to_string(static_cast<int>(dtype)) + "; take the code from dtype_codes");
}

// Whether values of type F are added to a stream of type X: F is X or narrower.
template <class X, class F>
constexpr bool kServed = std::is_same_v<X, F> || sizeof(F) < sizeof(X);

// Calls visit(Type of x, Type of k) for a residual stream x and what is added to it.
template <class Visit>
void dispatch_stream(const char* op, DType x, DType k, Visit visit) {
  dispatch_dtype(op, x, [&](auto x_type) {
    using X = typename decltype(x_type)::type;
    dispatch_dtype(op, k, [&](auto k_type) {
      if constexpr (kServed<X, typename decltype(k_type)::type>) {
        visit(x_type, k_type);
      } else {
        throw std::invalid_argument(std::string(op) + ": what is added must have x's dtype or a narrower one, got " + k_type.name +
                                    " with x " + x_type.name + "; convert it first");
      }
    });
  });
}

// Calls visit(Type of x, Type of k) for every pair that is served.
template <class Visit>
void for_each_stream(Visit visit) {
  for (DType x : kDTypes) {
    for (DType k : kDTypes) {
      dispatch_dtype("", x, [&](auto x_type) {
        using X = typename decltype(x_type)::type;
        dispatch_dtype("", k, [&](auto k_type) {
          if constexpr (kServed<X, typename decltype(k_type)::type>) visit(x_type, k_type);
        });
      });
    }
  }
}
