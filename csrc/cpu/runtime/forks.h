// Locks and forks.
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

}  // namespace mtlk
