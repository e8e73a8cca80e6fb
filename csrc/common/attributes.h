#pragma once
#include <cstddef>

#include "common/kernel.h"

// What the compiler made of a kernel for the current device.
struct KernelAttributes {
  int registers;             // of a thread
  size_t static_shared;      // bytes of a block, besides Kernel::shared
  size_t local;              // bytes of a thread: arrays that do not fit in registers, and spills
  int blocks_per_processor;  // most that a multiprocessor holds at a time
};

// Throws, with cudart's message, where there is no device. Not compiled for the host.
KernelAttributes attributes_of(const Kernel& kernel);
