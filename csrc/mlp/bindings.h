#pragma once
#include <pybind11/pybind11.h>

// The depth-fused kernels, and what Python has to know of their tiles.
void define_mlp(pybind11::module_& module);
