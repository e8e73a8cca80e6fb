// Executes one block at a time on the host: each CUDA thread is a fiber that runs until it blocks at a barrier or ends.
//
// Which fiber moves next decides what faults show, so there are two deterministic schedules. Round-robin: every thread in turn,
// the first one first, so threads stay close together. Greedy: of those that can move always the last one, so that a warp gets as
// far ahead of the others as barriers let it; the order of threads, and of blocks, is reversed. A forgotten barrier then meets
// data that are not there yet, or are overwritten too early, under one of the two.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {
constexpr int kLanesOfWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedAlignment = 128;

struct Copy {  // asynchronous, under way
  void* to;
  const void* from;
  int group;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf here;
  dim3 index;
  bool started, done;
  int waits_at;         // a barrier, or -1
  unsigned generation;  // of that barrier, when this thread arrived
  std::vector<Copy> copies;
  int copy_group;
};

struct Barrier {
  int threads = 0, arrived = 0;
  unsigned generation = 0;  // how often all threads have met here
};

// One set for the process, used by one launch at a time.
inline std::mutex launching;
inline bool greedy = false;
inline bool copies_late = true;  // asynchronous copies land when they are waited for; otherwise at once
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> barriers;  // 0: the block's; 1 + w: that of warp w
inline std::vector<unsigned char> shared_memory;
inline unsigned char* shared;
inline std::function<void()> body;
inline std::exception_ptr failure;  // thrown in a fiber, whose stack it cannot leave
inline jmp_buf scheduler;
inline int current;
inline uint64_t exchanged[1024 / kLanesOfWarp][kLanesOfWarp][3];  // what lanes show each other: warp, lane, up to 24 bytes

inline int lane() { return current % kLanesOfWarp; }
inline int warp() { return current / kLanesOfWarp; }

inline void arrive(int which) {
  Barrier& barrier = barriers[which];
  Fiber& fiber = fibers[current];
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    barrier.generation++;
    if (!greedy) return;
  }
  fiber.waits_at = which;
  fiber.generation = generation;
  if (!_setjmp(fiber.here)) _longjmp(scheduler, 1);
}

inline void enter() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

// Returns when the fiber blocks or ends. The first entry makes a stack; later ones only jump, which costs no system call.
inline void run_fiber(int which) {
  current = which;
  Fiber& fiber = fibers[which];
  fiber.waits_at = -1;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline bool can_move(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_at < 0 || barriers[fiber.waits_at].generation != fiber.generation);
}

inline void start_block(int threads, size_t shared_bytes) {
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  barriers.assign(1 + (threads + kLanesOfWarp - 1) / kLanesOfWarp, {});
  barriers[0].threads = threads;
  for (int i = 0; i < threads; i++) {
    barriers[1 + i / kLanesOfWarp].threads++;
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    fiber.started = fiber.done = false;
    fiber.waits_at = -1;
    fiber.copies.clear();
    fiber.copy_group = 0;
  }
  shared_memory.assign(shared_bytes + kSharedAlignment, 0xff);  // NaN in every floating type
  shared = shared_memory.data() + (-reinterpret_cast<uintptr_t>(shared_memory.data())) % kSharedAlignment;
}

inline void run_block(int threads, size_t shared_bytes) {
  start_block(threads, shared_bytes);
  failure = nullptr;
  for (bool moved = true; moved;) {
    moved = false;
    for (int k = 0; k < threads; k++) {
      const int i = greedy ? threads - 1 - k : k;
      if (!can_move(fibers[i])) continue;
      run_fiber(i);
      if (failure) std::rethrow_exception(failure);
      moved = true;
      if (greedy) break;
    }
  }
  for (int i = 0; i < threads; i++) {
    if (fibers[i].done) continue;
    const int at = fibers[i].waits_at;
    throw std::runtime_error("deadlock: thread " + std::to_string(i) + " waits for others at the barrier of " +
                             (at == 0 ? "the block" : "warp " + std::to_string(at - 1)));
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const std::lock_guard<std::mutex> lock(launching);
  gridDim = grid;
  blockDim = block;
  body = std::move(kernel);
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t i = greedy ? blocks - 1 - k : k;
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    run_block(static_cast<int>(block.x * block.y * block.z), shared_bytes);
  }
}
}  // namespace host
