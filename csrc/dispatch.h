// From dtype codes, known at run time, to types, known to the compiler. What is not served is an error, never a silent return.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "dtype_codes.h"

template <class T>
struct Type {
  using type = T;
};

// Calls visit(Type<T>{}) for the type that the code stands for.
template <class Visit>
void dispatch(const char* op, DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat64: return visit(Type<double>{});
    case DType::kFloat32: return visit(Type<float>{});
    case DType::kFloat16: return visit(Type<__half>{});
    case DType::kBFloat16: return visit(Type<__nv_bfloat16>{});
  }
  throw std::invalid_argument(std::string(op) + ": a dtype must be one of dtype_codes, got " +
                              std::to_string(static_cast<int>(dtype)) + "; take the code from dtype_codes");
}

// Calls visit(Type<X>{}, Type<F>{}) where F is X or narrower: a residual stream and what is added to it.
template <class Visit>
void dispatch_stream(const char* op, DType x, DType f, Visit visit) {
  dispatch(op, x, [&](auto x_type) {
    dispatch(op, f, [&](auto f_type) {
      using X = typename decltype(x_type)::type;
      using F = typename decltype(f_type)::type;
      if constexpr (std::is_same_v<X, F> || sizeof(F) < sizeof(X)) {
        visit(x_type, f_type);
      } else {
        throw std::invalid_argument(std::string(op) + ": f must have x's dtype or a narrower one, got codes " +
                                    std::to_string(static_cast<int>(f)) + " (f) and " + std::to_string(static_cast<int>(x)) +
                                    " (x); convert f first");
      }
    });
  });
}
