// What forks have to wait for, and what they leave behind.
#pragma once

#include <pthread.h>

#include <mutex>
#include <new>

namespace mtlk {

// Lets every fork wait for T::instance().mutex(): a child has none of the other threads, so that it would wait for ever
// for one that was in the midst of a call. Called once, where the instance is made. Forks take the locks in the reverse
// order of these calls: whose lock is held while another is taken comes after that other.
template <typename T>
void stay_free_across_forks() {
  const auto lock = [] { T::instance().mutex().lock(); };
  const auto unlock = [] { T::instance().mutex().unlock(); };
  if (pthread_atfork(lock, unlock, unlock) != 0) throw std::bad_alloc();
}

// Lets OpenMP's idle threads of a thread that forks end first: GCC's runtime in the child would wait for them for ever,
// also for PyTorch's own operators. The next parallel region, of the parent and of the child, begins new ones. Called
// once, after every stay_free_across_forks, so that no thread that ends waits for one of those locks. Does nothing
// where this process is itself a fork, whose threads may have been lost before.
void let_threads_go_before_forks();

}  // namespace mtlk
