// Structures at the Python boundary, filled with Python's values in the order of their fields.
// Addresses are integers, 0 for an operand that is absent.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

// Becomes a value of the type of the field that it initialises.
struct PythonValue {
  const char* where;
  pybind11::handle value;

  template <class T>
  operator T() const {
    try {
      if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value.cast<uintptr_t>());
      } else if constexpr (std::is_enum_v<T>) {
        return T{value.cast<int>()};
      } else {
        return value.cast<T>();
      }
    } catch (const pybind11::cast_error&) {
      throw pybind11::type_error(std::string(where) + ": operands must be numbers that fit their types, got " +
                                 std::string(pybind11::repr(value)) + "; an operand that is absent is 0");
    }
  }
};

template <class Struct, class Values, class = void>
constexpr bool kTakes = false;
template <class Struct, class... Values>
constexpr bool kTakes<Struct, void(Values...), std::void_t<decltype(Struct{std::declval<Values>()...})>> = true;

// How many fields a structure has.
template <class Struct, class... Values>
constexpr size_t field_count() {
  if constexpr (kTakes<Struct, void(Values..., PythonValue)>) {
    return field_count<Struct, Values..., PythonValue>();
  } else {
    return sizeof...(Values);
  }
}

template <class Struct, size_t... kIndices>
Struct filled(const char* where, const pybind11::tuple& values, std::index_sequence<kIndices...>) {
  return {PythonValue{where, PyTuple_GET_ITEM(values.ptr(), kIndices)}...};
}

template <class Struct>
Struct from_tuple(const char* where, const pybind11::tuple& values) {
  constexpr size_t kFields = field_count<Struct>();
  if (values.size() != kFields) {
    throw std::invalid_argument(std::string(where) + ": must be given " + std::to_string(kFields) + " operands, got " +
                                std::to_string(values.size()) + "; give them in the order of the structure's fields");
  }
  return filled<Struct>(where, values, std::make_index_sequence<kFields>());
}
