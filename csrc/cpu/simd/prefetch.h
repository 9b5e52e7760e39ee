// Fetching memory ahead of its use.
#pragma once

#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

class Fetcher;

// Memory that will be needed next. A tile fetches it little by little between its products: fetched at once, it would
// hold up what the products wait for, and the hardware's prefetchers lose the trail where a dozen rows are read at
// once.
struct Prefetch {
  const char* first = nullptr;
  int64_t bytes = 0;

  // The part that falls to a tile of groups [g, g + n) out of `groups`.
  Prefetch share(int64_t g, int64_t n, int64_t groups) const {
    return {first + bytes * g / groups, bytes * (g + n) / groups - bytes * g / groups};
  }

  // It, spread over the steps of a product.
  inline Fetcher over(int64_t steps) const;
};

// What is needed soon, and what is needed later.
struct Prefetches {
  Prefetch soon, later;

  Prefetches share(int64_t g, int64_t n, int64_t groups) const {
    return {soon.share(g, n, groups), later.share(g, n, groups)};
  }
  inline auto over(int64_t steps) const;
};

// In its place: work for which a product has a turn at every step.
template <typename Maker>
struct MakeAhead {
  Maker* maker;

  MakeAhead share(int64_t, int64_t, int64_t) const { return *this; }
  Maker& over(int64_t) const { return *maker; }
};

// Rows that are strips of wider ones are fetched this far ahead: no hardware prefetcher crosses the gaps. Behind the
// caches of processors with AMX memory is slower.
#if defined(__AMX_TILE__)
constexpr int64_t kRowsAhead = 64;
#else
constexpr int64_t kRowsAhead = 16;
#endif
template <typename T>
MTLK_INLINE void fetch_rows(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 3);
}

// Fetches a share of what will be needed with every step.
class Fetcher {
 public:
  Fetcher(const Prefetch& ahead, int64_t steps)  // of a product without depth there are none
      : next_(ahead.first),
        end_(ahead.first + ahead.bytes),
        lines_(steps > 0 ? (ahead.bytes / 64 + steps - 1) / steps : 0) {}
  void step() {
    for (int64_t i = 0; i < lines_ && next_ < end_; ++i, next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_, *end_;
  const int64_t lines_;
};

inline Fetcher Prefetch::over(int64_t steps) const { return {*this, steps}; }
inline auto Prefetches::over(int64_t steps) const {
  struct Both {
    Fetcher soon, later;
    void step() {
      soon.step();
      later.step();
    }
  };
  return Both{soon.over(steps), later.over(steps)};
}

}  // namespace MTLK_ISA
}  // namespace mtlk
