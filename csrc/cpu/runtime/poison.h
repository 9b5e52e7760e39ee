// Memory that nothing may touch for a while, which AddressSanitizer is told; without it these functions do nothing.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define MTLK_POISON
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MTLK_POISON
#endif
#endif

#if defined(MTLK_POISON)
#include <sanitizer/asan_interface.h>
#endif

namespace mtlk {

// Functions are static, so that none is shared between instruction sets.
#if defined(MTLK_POISON)
constexpr int64_t kRedZone = 64;  // bytes between neighbours that stay poisoned
static inline void poison(const void* first, int64_t bytes) { __asan_poison_memory_region(first, bytes); }
static inline void unpoison(const void* first, int64_t bytes) { __asan_unpoison_memory_region(first, bytes); }
#else
constexpr int64_t kRedZone = 0;
static inline void poison(const void*, int64_t) {}
static inline void unpoison(const void*, int64_t) {}
#endif

// What so many bytes take where they have a neighbour behind them: whole cache lines.
static constexpr int64_t padded(int64_t bytes) { return (bytes + kRedZone + 63) / 64 * 64; }

// Leaves the first `bytes` usable of what they take.
static inline void fence(const void* first, int64_t bytes) {
  poison(first, padded(bytes));
  unpoison(first, bytes);
}

}  // namespace mtlk
