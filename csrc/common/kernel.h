// A kernel as `kernel_attributes` reports on it.
#pragma once
#include <cstddef>
#include <string>

struct Kernel {
  std::string name;
  const void* function;
  int threads;    // of a block
  size_t shared;  // dynamic shared memory of a block, bytes
};
