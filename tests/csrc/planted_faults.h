// Faults that sanitizers have to find, by name. What is written may be no constant, or compilers warn of it.
#pragma once

#include <atomic>
#include <cstdio>
#include <limits>
#include <string>
#include <thread>

#include "runtime/memory.h"
#include "runtime/parallel.h"

namespace planted {

inline volatile int one = 1, kept = 0;

inline void write(void* first, int64_t byte) { static_cast<volatile char*>(first)[byte] = static_cast<char>(one); }

// Makes the fault of this name, and says so where reports go, too; whether there is one.
inline bool make(const std::string& name) {
  std::fprintf(stderr, "\nplanted: %s\n", name.c_str());
  if (name == "an overrun of a piece") {
    const mtlk::Scratch scratch(2, 100);  // less than the cache lines that a piece takes
    write(scratch[0], 99 + one);
  } else if (name == "an overrun into a neighbour") {
    const mtlk::Scratch pieces(2, 128);
    write(pieces[0], 127 + one);
  } else if (name == "an overrun of all pieces") {
    const mtlk::Scratch last(3, 128), following(1, 128);
    write(last[2], 127 + one);
  } else if (name == "a use after giving back") {
    void* first = nullptr;
    {
      const mtlk::Scratch scratch(1, 4096);
      first = scratch[0];
    }
    write(first, 7);
  } else if (name == "an overflow") {
    kept = std::numeric_limits<int>::max() + one;
  } else if (name == "a misaligned access") {
    alignas(8) char bytes[16] = {};
    *reinterpret_cast<volatile int*>(bytes + one) = 1;
  } else if (name == "a shift past the width") {
    kept = 1 << (31 + one);
  } else if (name == "a race for a result") {
    int sum = 0;
    std::atomic<int> begun{0};
    mtlk::parallel_tasks(2, 2, [&](int64_t) {
      begun.fetch_add(1, std::memory_order_relaxed);
      while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
      sum += one;
    });
  } else if (name == "a race after giving back") {
    void* stale = nullptr;
    {
      const mtlk::Scratch scratch(1, 1 << 16);
      stale = scratch[0];
    }
    std::thread other([&] {
      const mtlk::Scratch scratch(1, 1 << 16);
      write(scratch[0], 7);
    });
    write(stale, 7);
    other.join();
  } else {
    return false;
  }
  return true;
}

}  // namespace planted
