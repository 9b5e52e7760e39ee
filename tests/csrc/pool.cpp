// The memory pool under sanitizers: `pool` takes and gives back on several threads and checks what comes of it, `pool
// forks` does so while the process forks, `pool NAME...` makes faults of planted_faults.h, or lets the pool take no
// lock. The exit status is 1 where a check fails.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace std {

bool nothing_is_locked = false;

// Takes the place of std::lock_guard in the pool.
template <typename Mutex>
class switched_guard {
 public:
  explicit switched_guard(Mutex& mutex) : mutex_(nothing_is_locked ? nullptr : &mutex) {
    if (mutex_) mutex_->lock();
  }
  ~switched_guard() {
    if (mutex_) mutex_->unlock();
  }
  switched_guard(const switched_guard&) = delete;
  switched_guard& operator=(const switched_guard&) = delete;

 private:
  Mutex* mutex_;
};

}  // namespace std

#define lock_guard switched_guard
#include "../../csrc/cpu/runtime/memory.cpp"
#undef lock_guard

#include "planted_faults.h"

namespace {

using mtlk::MemoryPool;
using mtlk::Scratch;

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kMostHeld = 256 * kMiB;  // where no more is in use again and again; docs promise it

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::_Exit(1);
}

// Memory as the C library has it, counted. Relaxed, so that counting orders nothing between threads.
class Counting : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* const memory = static_cast<size_t*>(std::malloc(bytes + kFront));
    check(memory != nullptr, "there is no memory");
    memory[0] = bytes;
    live.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
    made.fetch_add(1, std::memory_order_relaxed);
    return {reinterpret_cast<char*>(memory) + kFront, memory, &free, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  std::atomic<int64_t> live{0}, made{0};

 private:
  static constexpr size_t kFront = 48;  // so that nothing is aligned by chance
  static void free(void* memory);
};

Counting counting;

void Counting::free(void* memory) {
  counting.live.fetch_sub(static_cast<int64_t>(*static_cast<size_t*>(memory)), std::memory_order_relaxed);
  std::free(memory);
}

// Pieces that one thread holds, filled with a byte that nobody else uses.
struct Held {
  Held(int64_t pieces, int64_t bytes, bool brief, char mark)
      : scratch(pieces, bytes, brief), pieces(pieces), bytes(bytes), mark(mark) {
    for (int64_t i = 0; i < pieces; ++i) {
      check(reinterpret_cast<uintptr_t>(scratch[i]) % 64 == 0, "a piece starts within a cache line");
      std::fill_n(static_cast<char*>(scratch[i]), bytes, mark);
    }
  }
  ~Held() {
    for (int64_t i = 0; i < pieces; ++i) {
      const char* const first = static_cast<const char*>(scratch[i]);
      check(std::all_of(first, first + bytes, [&](char c) { return c == mark; }), "pieces overlap");
    }
  }

  Scratch scratch;
  int64_t pieces, bytes;
  char mark;
};

void take_and_give_back(int thread) {
  std::mt19937 random(static_cast<unsigned>(thread));
  std::vector<std::unique_ptr<Held>> held;
  std::vector<at::Tensor> tensors;
  for (int step = 0; step < 400; ++step) {
    const int64_t bytes = random() % 8 == 0 ? random() % (kMiB / 4) : random() % 9000;
    const char mark = static_cast<char>(1 + thread * 16 + step % 16);
    held.push_back(std::make_unique<Held>(random() % 4, bytes, random() % 2 == 0, mark));
    if (held.size() > 6) held.erase(held.begin() + random() % held.size());
    tensors.push_back(mtlk::pooled({bytes}, at::kByte, random() % 2 == 0));
    std::fill_n(tensors.back().mutable_data_ptr<uint8_t>(), bytes, static_cast<uint8_t>(mark));
    if (tensors.size() > 3) tensors.erase(tensors.begin());
    if (step % 50 == 0) check(MemoryPool::instance().release() <= kMostHeld, "the pool holds too much");
  }
}

void on_threads() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) threads.emplace_back(take_and_give_back, t);
  for (std::thread& thread : threads) thread.join();
}

// Once nothing is in use, what is left are whole blocks: those of which parts were taken have merged again.
void everything_merges() {
  check(counting.live > 0, "the pool keeps nothing");
  MemoryPool::instance().release();
  check(counting.live == 0, "parts of a block have not merged");
  const void* first = nullptr;
  {
    const Scratch whole(1, 64 * kMiB);
    first = whole[0];
  }
  std::vector<std::unique_ptr<Scratch>> parts;
  for (int i = 0; i < 50; ++i) parts.push_back(std::make_unique<Scratch>(1, 10000 + i));
  check((*parts[0])[0] == first, "a brief piece is no part of an idle block");
  for (int i = 0; i < 50; i += 2) parts[i].reset();
  parts.clear();
  const Scratch again(1, 64 * kMiB, false);
  check(again[0] == first, "parts of a block have not merged");
}

void use_at_once(int64_t mebibytes) {
  const Scratch a(1, mebibytes * kMiB), b(1, 90 * kMiB), c(1, 80 * kMiB), d(1, 70 * kMiB);
}

void little_is_held_of_what_comes_once() {
  for (const int64_t size : {100, 200, 300}) {
    use_at_once(size);
    check(counting.live <= kMostHeld + 4096, "the pool holds too much");
    check(MemoryPool::instance().release() <= kMostHeld && counting.live == 0, "something is left");
  }
}

void what_is_used_again_is_held() {
  constexpr int64_t kAtOnce = (300 + 90 + 80 + 70) * kMiB;
  use_at_once(300);
  use_at_once(300);
  const int64_t made = counting.made;
  for (int step = 0; step < 5; ++step) use_at_once(300);
  check(counting.made == made, "a step takes fresh memory again");
  check(counting.live <= kAtOnce + 4096, "the pool holds more than was in use");
  // Steps that need a little more each time do not pile up what they leave.
  for (int64_t size = 301; size < 340; ++size) {
    const Scratch whole(1, size * kMiB, false);
    use_at_once(size);
    check(counting.live <= (2 * size + 240) * kMiB * 5 / 4 + 4096, "the pool holds more than a quarter beside");
  }
  for (int step = 0; step < 10000; ++step) const Scratch small(1, 1000);
  check(counting.live <= kMostHeld + 4096, "the pool holds for ever what is not needed any more");
  MemoryPool::instance().release();
}

// What tasks wrote is there afterwards, each on a thread that it has for itself; `run` hands them out.
template <typename Run>
void each_is_done_once(Run run) {
  constexpr int64_t kThreads = 3;
  for (const int64_t tasks : {0, 1, 2, 500}) {
    std::vector<int> done(tasks), busy(kThreads);
    run(kThreads, tasks, [&](int64_t task, int64_t thread) {
      const Scratch scratch(1, 5000);
      std::fill_n(static_cast<char*>(scratch[0]), 5000, 'a');
      check(busy[thread]++ == 0, "two tasks share a thread's memory");
      ++done[task];
      --busy[thread];
    });
    check(std::all_of(done.begin(), done.end(), [](int times) { return times == 1; }), "a task ran never, or twice");
  }
}

void tasks_are_done_once() {
  each_is_done_once([](int64_t threads, int64_t tasks, auto f) { mtlk::parallel_tasks_on(threads, tasks, f); });
  each_is_done_once([](int64_t threads, int64_t tasks, auto f) { mtlk::parallel_runs_on(threads, tasks, f); });
}

#if defined(__SANITIZE_THREAD__)  // elsewhere this program may have one thread
// A thread begins with its own run, and ends with what another is slow to begin.
void runs_stay_and_are_shared() {
  constexpr int64_t kTasks = 8;
  alarm(60);  // ends the program, where a thread waits for ever
  std::array<std::atomic<int64_t>, kTasks> by{};
  std::atomic<int64_t> met{0}, others{0};
  std::atomic<bool> begun{false};
  mtlk::parallel_runs_on(2, kTasks, [&](int64_t task, int64_t thread) {
    by[task] = thread;
    if (task == 0) {  // the first thread's first, until the second thread has done all else
      begun = true;
      while (others < kTasks - 1) std::this_thread::yield();
      return;
    }
    if (met++ == 0) {
      check(task == kTasks / 2 && thread == 1, "a thread does not begin with its own run");
      while (!begun) std::this_thread::yield();
    }
    ++others;
  });
  check(by[0] == 0, "a thread does not begin with its own run");
  for (int64_t task = 1; task < kTasks; ++task) check(by[task] == 1, "a thread waits for one that is slow");
  alarm(0);
}
#endif

// A child finds the lock free, whoever held it when it was forked.
void children_find_it_free() {
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      while (!over) const Scratch scratch(1, 5000);
    });
  }
  for (int i = 0; i < 30; ++i) {
    const pid_t child = fork();
    check(child >= 0, "there are no more processes");
    if (child == 0) {
      alarm(20);  // ends it
      {
        const Scratch scratch(1, 5000);
      }
      _exit(0);
    }
    int status = -1;
    check(waitpid(child, &status, 0) == child && status == 0, "a child of a fork waits for ever");
  }
  over = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int count, char** arguments) {
  c10::SetCPUAllocator(&counting, 1);
  const std::vector<std::string> names(arguments + 1, arguments + count);
  for (const std::string& name : names) {
    if (name == "a pool without its lock") {
      std::nothing_is_locked = true;
      on_threads();
    } else if (name == "forks") {
      children_find_it_free();
    } else {
      check(planted::make(name), "there is no fault of this name");
    }
  }
  if (!names.empty()) return 0;
  on_threads();
  everything_merges();
  little_is_held_of_what_comes_once();
  what_is_used_again_is_held();
  tasks_are_done_once();
#if defined(__SANITIZE_THREAD__)
  runs_stay_and_are_shared();
#endif
  return 0;
}
