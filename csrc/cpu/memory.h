// Memory for intermediates.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>

#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mtlk {

// Asks for huge pages under a large fresh tensor: touching it then costs a page fault for every 2 MiB instead of every
// 4 KiB, which is some 10% of a training step. The kernel may ignore it.
inline at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + tensor.nbytes()) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// Byte tensors kept from one call to the next: touching fresh memory costs a page fault and the kernel's zeroing, which
// is some 10% of a training step.
class MemoryPool {
 public:
  static MemoryPool& instance() {
    static auto* pool = new MemoryPool;  // never destroyed: torch may be gone by then
    return *pool;
  }

  // The smallest tensor of at least `bytes` and at most twice as many, or a new one.
  at::Tensor take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto best = idle_.lower_bound(bytes);
    if (best == idle_.end() || best->first > 2 * bytes) return with_huge_pages(at::empty({bytes}, at::kByte));
    at::Tensor found = std::move(best->second);
    held_ -= best->first;
    idle_.erase(best);
    return found;
  }

  // Keeps it for later; the largest go where the pool would hold more than kMost.
  void give_back(at::Tensor tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ += tensor.numel();
    idle_.emplace(tensor.numel(), std::move(tensor));
    while (held_ > kMost) {
      const auto largest = std::prev(idle_.end());
      held_ -= largest->first;
      idle_.erase(largest);
    }
  }

  // Lets go of everything that waits for a later call; the number of bytes.
  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.clear();
    return std::exchange(held_, 0);
  }

 private:
  static constexpr int64_t kMost = int64_t{256} << 20;
  std::mutex mutex_;
  std::multimap<int64_t, at::Tensor> idle_;  // by size
  int64_t held_ = 0;
};

inline void* cache_line(at::Tensor& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// An uninitialised tensor whose memory goes back to the pool when its last user is gone, for results that are made at
// every step and dropped before the next.
inline at::Tensor pooled(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  constexpr int64_t kSmall = 1 << 14;
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kSmall) return at::empty_strided(sizes, strides, options);
  at::Tensor memory = MemoryPool::instance().take(bytes + 64);
  void* const first = cache_line(memory);
  const auto give_back = [memory = std::move(memory)](void*) mutable {
    MemoryPool::instance().give_back(std::move(memory));
  };
  at::Tensor result = at::from_blob(first, sizes, strides, give_back, options);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    result.fill_(std::numeric_limits<double>::quiet_NaN());  // as fresh memory is filled then
  }
  return result;
}

inline at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return pooled(sizes, c10::contiguous_strides(sizes), options);
}

// Uninitialised pieces of equal size, each of which starts on a cache line.
class Scratch {
 public:
  Scratch(int64_t pieces, int64_t bytes)
      : stride_((bytes + 63) / 64 * 64), memory_(MemoryPool::instance().take(pieces * stride_ + 64)) {
    first_ = static_cast<char*>(cache_line(memory_));
  }
  ~Scratch() { MemoryPool::instance().give_back(std::move(memory_)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* operator[](int64_t piece) const { return first_ + piece * stride_; }

 private:
  int64_t stride_;
  at::Tensor memory_;
  char* first_;
};

}  // namespace mtlk
