// The element types at the Python boundary. Python reads the codes from the module (bindings.cpp), so they are written nowhere else.
#pragma once

enum class DType : int { kFloat64, kFloat32, kFloat16, kBFloat16 };
