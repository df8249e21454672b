// Runs CUDA kernels on the CPU, for tests on machines without a GPU: what csrc/common.cuh includes in place of the CUDA
// runtime when DINOV2_FAST_ON_HOST is defined.
//
// Blocks run one after another. Each thread of a block is a fiber, which runs until it comes to a barrier or a shuffle;
// it goes on when all threads concerned have come there. In each round the fibers run in another order and some warps
// not at all, so that what one reads before or after its time, for want of a barrier, shows as a wrong result. What
// would hang or be undefined on a GPU (a barrier that not all threads reach, a shuffle with a lane that has ended) is
// an error.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace cuda_on_host {

enum class State { ready, at_barrier, at_shuffle, ended };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state;
  uint3 index;
  int shuffles;      // how many it has taken part in
  float offered[2];  // its values in the last two: a lane may be a shuffle ahead of those that still read
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline int current;
inline const std::function<void()>* kernel;
inline std::mt19937 order_generator;

}  // namespace cuda_on_host

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

inline void run_fiber() {
  (*kernel)();
  fibers[current].state = State::ended;  // uc_link leads back to the scheduler
}

inline void wait(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

// Lets go on what waits for nobody any more. False if nothing does.
inline bool release(int threads) {
  bool any = false;
  const auto has = [](State state) { return [state](const Fiber& fiber) { return fiber.state == state; }; };
  const auto begin = fibers.begin();
  const auto go_on = [&](auto from, auto to) {
    std::for_each(from, to, [](Fiber& fiber) { fiber.state = State::ready; });
    any = true;
  };
  for (int first = 0; first < threads; first += 32) {
    const auto warp = begin + first, end = begin + std::min(first + 32, threads);
    if (end - warp == 32 && std::all_of(warp, end, has(State::at_shuffle))) go_on(warp, end);
  }
  if (std::all_of(begin, begin + threads, has(State::at_barrier))) go_on(begin, begin + threads);
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
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  unsigned sleeping = 0;  // a bit for each warp; some sleep so long that others come to the next barrier or past it
  bool ran = true, left = true;
  for (int round = 0; release(threads) || left; ++round) {
    if (round % 32 == 0 || !ran) sleeping = order_generator();
    std::shuffle(order.begin(), order.end(), order_generator);
    ran = left = false;
    for (int t : order) {
      if (fibers[t].state != State::ready) continue;
      if (sleeping >> t / 32 & 1) {
        left = true;
        continue;
      }
      ran = true;
      current = t;
      threadIdx = fibers[t].index;
      swapcontext(&scheduler, &fibers[t].context);
    }
  }
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != State::ended) throw std::logic_error("threads of a block wait for others that never come");
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::State::at_barrier); }

inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  using namespace cuda_on_host;
  if (mask != 0xffffffffu) throw std::logic_error("only shuffles of whole warps are there");
  const int turn = fibers[current].shuffles++ % 2;
  fibers[current].offered[turn] = value;
  wait(State::at_shuffle);
  return fibers[current ^ lanes].offered[turn];
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
