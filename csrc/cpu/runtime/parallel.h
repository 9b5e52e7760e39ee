// Tasks over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif

#include "runtime/memory.h"

namespace mtlk {

// Runs f(thread) once on each of `threads` threads.
template <typename F>
void parallel_threads(int64_t threads, F f) {
  if (threads <= 1) return f(0);
#if defined(__SANITIZE_THREAD__)
  // OpenMP's own threads meet in code that ThreadSanitizer does not see.
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back([&f, t] { f(t); });
  f(0);
  for (std::thread& other : others) other.join();
#else
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
#endif
}

// Runs f(task, thread) for each of `tasks` tasks; a thread takes the next one when it is free. Each task must write
// only what is its own, so that the result does not depend on who runs it.
template <typename F>
void parallel_tasks_on(int64_t threads, int64_t tasks, F f) {
  threads = std::min(threads, tasks);
  std::atomic<int64_t> next{0};
  parallel_threads(threads, [&](int64_t thread) {
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };  // orders nothing: tasks need not
    for (int64_t task = take(); task < tasks; task = take()) f(task, thread);
  });
}

// The same where a call comes back to what tasks of an earlier one wrote: each thread begins with a run of its own, the
// same in every call of as many tasks, so that this is in its caches; then it takes what others have not begun.
template <typename F>
void parallel_runs_on(int64_t threads, int64_t tasks, F f) {
  struct alignas(64) Run {
    std::atomic<int64_t> next;
  };
  threads = std::min(threads, tasks);
  if (threads <= 1) return parallel_tasks_on(threads, tasks, f);
  const auto begin = [=](int64_t run) { return tasks * run / threads; };
  std::vector<Run> runs(threads);
  for (int64_t i = 0; i < threads; ++i) runs[i].next.store(begin(i), std::memory_order_relaxed);
  parallel_threads(threads, [&](int64_t thread) {
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t run = (thread + i) % threads, end = begin(run + 1);
      const auto take = [&] { return runs[run].next.fetch_add(1, std::memory_order_relaxed); };
      for (int64_t task = take(); task < end; task = take()) f(task, thread);
    }
  });
}

template <typename F>
void parallel_tasks(int64_t threads, int64_t tasks, F f) {
  parallel_tasks_on(threads, tasks, [&](int64_t task, int64_t) { f(task); });
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a task: enough to hide the cost of taking it, few enough to share out evenly.
constexpr int64_t kTaskRows = 64;

// f(task, first row, last row, scratch of so many bytes) for each task of all rows.
template <typename F>
void parallel_rows(int64_t rows, int64_t bytes, F f) {
  const int64_t tasks = divide_up(rows, kTaskRows), threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (tasks == 0) return;
  const Scratch scratch(threads, bytes);
  parallel_tasks_on(threads, tasks, [&](int64_t task, int64_t thread) {
    f(task, task * kTaskRows, std::min(rows, (task + 1) * kTaskRows), scratch[thread]);
  });
}

}  // namespace mtlk
