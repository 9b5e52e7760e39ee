#include "runtime/forks.h"

#if defined(__linux__)
#include <omp.h>

#include <cstdio>
#include <cstring>

// A runtime older than OpenMP 5.0, as GCC's before version 9, has none.
#pragma weak omp_pause_resource_all

namespace mtlk {
namespace {

constexpr unsigned long kForkedNoExec = 0x0040;  // PF_FORKNOEXEC of the kernel's flags of a process

// Whether this process is a fork that has not begun another program.
bool is_fork() {
  char line[1024];
  std::FILE* const file = std::fopen("/proc/self/stat", "r");
  if (!file) return false;
  const bool read = std::fgets(line, sizeof(line), file) != nullptr;
  std::fclose(file);
  const char* const name_end = read ? std::strrchr(line, ')') : nullptr;
  unsigned long flags = 0;
  if (!name_end || std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) != 1) return false;
  return (flags & kForkedNoExec) != 0;
}

// Of the thread that forks: whether its runtime could let go of its threads, and may be asked to.
thread_local bool let_go = true;

void let_threads_go() { let_go = let_go && omp_pause_resource_all(omp_pause_hard) == 0; }

}  // namespace

void let_threads_go_before_forks() {
  // A fork may have inherited a runtime that waits for threads which it does not have.
  if (!omp_pause_resource_all || is_fork()) return;
  if (pthread_atfork(let_threads_go, [] { let_go = true; }, nullptr) != 0) throw std::bad_alloc();
}

}  // namespace mtlk

#else

namespace mtlk {
void let_threads_go_before_forks() {}
}  // namespace mtlk

#endif
