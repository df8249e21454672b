// Runs CUDA kernels on the CPU, for tests on machines without a GPU. csrc/common.cuh includes it in place of the CUDA
// runtime if DINOV2_FAST_ON_HOST is defined.
//
// Blocks run one after another. Each thread of a block is a fiber. It runs until it reaches a shuffle, and resumes when
// its whole warp has reached the shuffle. A shuffle with a lane that has ended is undefined on a GPU; here it is an
// error.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace cuda_on_host {

enum class State { ready, at_shuffle, ended };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state;
  uint3 index;
  int shuffles;         // how many shuffles it has taken part in
  uint32_t offered[2];  // its words in the last two shuffles, because other lanes may still read the one before
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current;
inline const std::function<void()>* kernel;

}  // namespace cuda_on_host

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

inline void run_fiber() {
  (*kernel)();
  fibers[current].state = State::ended;  // uc_link leads back to the scheduler
}

inline void wait_for_warp() {
  Fiber& fiber = fibers[current];
  fiber.state = State::at_shuffle;
  swapcontext(&fiber.context, &scheduler);
}

// Resumes the warps of which all lanes have reached a shuffle. False if there is none.
inline bool release(int threads) {
  bool any = false;
  const auto waits = [](const Fiber& fiber) { return fiber.state == State::at_shuffle; };
  for (int first = 0; first + 32 <= threads; first += 32) {
    const auto warp = fibers.begin() + first;
    if (!std::all_of(warp, warp + 32, waits)) continue;
    std::for_each(warp, warp + 32, [](Fiber& fiber) { fiber.state = State::ready; });
    any = true;
  }
  return any;
}

inline void run_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = State::ready;
    fiber.shuffles = 0;
    fiber.index.x = t % blockDim.x;
    fiber.index.y = t / blockDim.x % blockDim.y;
    fiber.index.z = t / (blockDim.x * blockDim.y);
  }
  do {
    for (int t = 0; t < threads; ++t) {
      if (fibers[t].state != State::ready) continue;
      current = t;
      threadIdx = fibers[t].index;
      swapcontext(&scheduler, &fibers[t].context);
    }
  } while (release(threads));
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != State::ended)
      throw std::logic_error("threads of a block wait at a shuffle that others never reach");
  }
}

}  // namespace cuda_on_host

template <typename Word>
Word __shfl_xor_sync(unsigned mask, Word value, int lanes) {
  using namespace cuda_on_host;
  static_assert(sizeof(Word) == sizeof(uint32_t));
  if (mask != 0xffffffffu) throw std::logic_error("only shuffles of whole warps are implemented");
  const int turn = fibers[current].shuffles++ % 2;
  std::memcpy(&fibers[current].offered[turn], &value, sizeof(value));
  wait_for_warp();
  std::memcpy(&value, &fibers[current ^ lanes].offered[turn], sizeof(value));
  return value;
}

namespace dinov2_fast {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, const Arguments&... arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int threads = block.x * block.y * block.z;
  if (threads < 1 || threads > 1024) throw std::logic_error("a block of CUDA has 1 to 1024 threads");
  if (static_cast<int>(cuda_on_host::fibers.size()) < threads) cuda_on_host::fibers.resize(threads);
  const std::function<void()> call = [&] { kernel(arguments...); };
  cuda_on_host::kernel = &call;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx.x = x, blockIdx.y = y, blockIdx.z = z;
        cuda_on_host::run_block(threads);
      }
    }
  }
}

}  // namespace dinov2_fast
