// The element types at the Python boundary. Python reads the codes from the module (bindings.cpp), so they are written nowhere else.
#pragma once

enum class DType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };
constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// As torch names them.
constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "";
}
