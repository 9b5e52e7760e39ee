// Tasks over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace mtlk {

// Runs f(thread) once on each of `threads` threads.
template <typename F>
void parallel_threads(int64_t threads, F f) {
  if (threads <= 1) return f(0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// Runs f(task, thread) for each of `tasks` tasks; a thread takes the next one when it is free. Each task must write
// only what is its own, so that the result does not depend on who runs it.
template <typename F>
void parallel_tasks_on(int64_t threads, int64_t tasks, F f) {
  threads = std::min(threads, tasks);
  std::atomic<int64_t> next{0};
  parallel_threads(threads, [&](int64_t thread) {
    for (int64_t task = next++; task < tasks; task = next++) f(task, thread);
  });
}

template <typename F>
void parallel_tasks(int64_t threads, int64_t tasks, F f) {
  parallel_tasks_on(threads, tasks, [&](int64_t task, int64_t) { f(task); });
}

}  // namespace mtlk
