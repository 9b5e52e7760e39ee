// Stands in for csrc/cuda/device.h on a host: blocks one after another in a random order, a block's threads as fibers.
//
// Threads switch only where they wait for each other, and run in a random order, in half of the blocks one warp far
// ahead of the others, so that a missing barrier changes results, or reads what a later thread has yet to write.
// Waiting is strict: all threads of the block, or of the warp, must come to the same line, and none may have returned.
//
// With MTLK_BLOCKS_AT_ONCE several threads of the host run blocks at the same time, for ThreadSanitizer to watch: what
// orders two blocks then is a counter with a fence in front of it and one behind it, and nothing else.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define MTLK_GLOBAL
#define MTLK_DEVICE
#define __launch_bounds__(threads)
#define __shared__ static thread_local  // a thread of the host runs one block at a time
#define __syncthreads() emulated::Block::now->wait(emulated::kBlock, __LINE__)
#define __syncwarp() emulated::Block::now->wait(emulated::kWarp, __LINE__)

namespace emulated {

struct Index {
  unsigned x;
};

enum Scope { kRunning, kWarp, kBlock, kReturned };

struct Fiber {
  ucontext_t context;
  Scope waits = kRunning;  // for whom
  int line = 0;            // where
};

class Block {
 public:
  static inline thread_local Block* now = nullptr;
  static constexpr std::size_t kStack = 1 << 16;
  static inline thread_local std::vector<std::unique_ptr<char[]>> stacks;  // a fiber's serves all blocks

  Block(int threads, std::mt19937& random, std::function<void()> kernel)
      : fibers_(threads), random_(random), kernel_(std::move(kernel)) {}

  void run();

  void wait(Scope scope, int line) {
    fibers_[current_].waits = scope;
    fibers_[current_].line = line;
    swapcontext(&fibers_[current_].context, &scheduler_);
  }

  // Two of each, so that a lane can offer its next operands before all have read the last ones.
  struct Exchange {
    double a[2][32], b[2][32];
    int products[32] = {};
  };
  Exchange& exchange(int warp) { return exchanges_[warp]; }

 private:
  static void enter() {
    now->kernel_();
    now->fibers_[now->current_].waits = kReturned;
  }

  // Lets threads first .. last - 1 go on if all of them wait for each other.
  bool release(int first, int last, Scope scope) {
    for (int t = first; t < last; ++t) {
      if (fibers_[t].waits != scope) return false;
    }
    for (int t = first; t < last; ++t) {
      if (fibers_[t].line != fibers_[first].line) {
        throw std::runtime_error("threads wait for each other on lines " + std::to_string(fibers_[first].line) +
                                 " and " + std::to_string(fibers_[t].line));
      }
      fibers_[t].waits = kRunning;
      ready_.push_back(t);
    }
    return true;
  }

  std::vector<Fiber> fibers_;
  std::vector<int> ready_;
  std::vector<Exchange> exchanges_;
  std::mt19937& random_;
  std::function<void()> kernel_;
  ucontext_t scheduler_;
  int current_ = 0;
};

}  // namespace emulated

inline thread_local emulated::Index threadIdx, blockIdx, gridDim;

inline void emulated::Block::run() {
  now = this;
  const int threads = static_cast<int>(fibers_.size());
  exchanges_.assign((threads + 31) / 32, {});
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers_[t];
    if (static_cast<int>(stacks.size()) == t) stacks.emplace_back(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[t].get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
    ready_.push_back(t);
  }
  std::shuffle(ready_.begin(), ready_.end(), random_);
  const bool ahead = random_() % 2;  // a warp goes as far as it can while others have yet to start
  while (!ready_.empty()) {
    if (!ahead) std::swap(ready_[random_() % ready_.size()], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    threadIdx.x = current_;
    swapcontext(&scheduler_, &fibers_[current_].context);
    const int warp = current_ / 32 * 32;
    if (fibers_[current_].waits == kWarp) release(warp, warp + 32 < threads ? warp + 32 : threads, kWarp);
    if (fibers_[current_].waits == kBlock) release(0, threads, kBlock);
  }
  for (const Fiber& fiber : fibers_) {
    if (fiber.waits != kReturned) {
      throw std::runtime_error("a thread waits forever on line " + std::to_string(fiber.line));
    }
  }
}

namespace emulated {

// What a fence does depends on the counter of the thread that comes to it: in front of it, all that was written is seen
// by whoever counts later and has a fence behind that. Tests leave one of the two out.
inline thread_local bool fenced = false;
inline thread_local long long* counted = nullptr;
inline bool without_fence_before = false, without_fence_behind = false;

}  // namespace emulated

inline void __threadfence() {
  using namespace emulated;
  if (counted == nullptr) {
    fenced = !without_fence_before;
  } else {
    if (!without_fence_behind) std::atomic_ref(*counted).load(std::memory_order_acquire);
    counted = nullptr;
  }
}

namespace mtlk::cuda {

inline void mma(double (&sums)[2], double a, double b) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  auto& exchange = emulated::Block::now->exchange(threadIdx.x / 32);
  const int slot = exchange.products[lane]++ % 2;
  exchange.a[slot][lane] = a;
  exchange.b[slot][lane] = b;
  emulated::Block::now->wait(emulated::kWarp, __LINE__);
  for (int c = 0; c < 2; ++c) {
    for (int k = 0; k < 4; ++k) {
      sums[c] = std::fma(exchange.a[slot][row * 4 + k], exchange.b[slot][(column + c) * 4 + k], sums[c]);
    }
  }
}

inline long long count_up(long long* counter) {
  const auto order = emulated::fenced ? std::memory_order_release : std::memory_order_relaxed;
  emulated::fenced = false;
  emulated::counted = counter;
  return std::atomic_ref(*counter).fetch_add(1, order);
}

inline double read_shared_by_blocks(const double* source) { return *source; }

}  // namespace mtlk::cuda

namespace emulated {

#ifdef MTLK_BLOCKS_AT_ONCE
constexpr unsigned kWorkers = 4;  // threads of the host
#else
constexpr unsigned kWorkers = 1;
#endif

// Runs a kernel; nullptr, or what would have gone wrong.
inline const char* launch(unsigned blocks, int threads, unsigned seed, const std::function<void()>& kernel) {
  static std::string error;
  std::mt19937 random(seed);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  std::string errors[kWorkers];
  const auto work = [&](unsigned worker) {
    std::mt19937 own(seed + worker);
    gridDim.x = blocks;
    try {
      for (unsigned i = worker; i < blocks; i += kWorkers) {
        blockIdx.x = order[i];
        Block(threads, own, kernel).run();
      }
    } catch (const std::exception& failure) {
      errors[worker] = failure.what();
    }
  };
  if (kWorkers == 1) {
    work(0);
  } else {
    std::vector<std::thread> workers;
    for (unsigned worker = 0; worker < kWorkers; ++worker) workers.emplace_back(work, worker);
    for (std::thread& worker : workers) worker.join();
  }
  for (const std::string& found : errors) {
    if (!found.empty()) return (error = found).c_str();
  }
  return nullptr;
}

}  // namespace emulated
