// Memory for intermediates.
#pragma once

#include <ATen/ATen.h>

#include <deque>
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
// is some 10% of a training step of a thousand rows.
class ScratchPool {
 public:
  static ScratchPool& instance() {
    static auto* pool = new ScratchPool;  // never destroyed: torch may be gone by then
    return *pool;
  }

  // The smallest tensor of at least `bytes` and at most twice as many, or a new one.
  at::Tensor take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const int64_t size = it->numel();
      if (size >= bytes && size <= 2 * bytes && (best == idle_.end() || size < best->numel())) best = it;
    }
    if (best == idle_.end()) return with_huge_pages(at::empty({bytes}, at::kByte));
    at::Tensor found = std::move(*best);
    idle_.erase(best);
    held_ -= found.numel();
    return found;
  }

  // Keeps it for later; the oldest go where the pool would hold more than kMost.
  void give_back(at::Tensor tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ += tensor.numel();
    idle_.push_back(std::move(tensor));
    while (held_ > kMost) {
      held_ -= idle_.front().numel();
      idle_.pop_front();
    }
  }

 private:
  static constexpr int64_t kMost = int64_t{64} << 20;
  std::mutex mutex_;
  std::deque<at::Tensor> idle_;
  int64_t held_ = 0;
};

// An uninitialised tensor like another one, whose memory goes back to the pool when its last user is gone: results that
// are made at every step, and dropped before the next, then cost no page faults.
inline at::Tensor pooled_like(const at::Tensor& like) {
  constexpr size_t kSmall = 1 << 14;
  if (like.nbytes() < kSmall) return at::empty_like(like);
  at::Tensor memory = ScratchPool::instance().take(static_cast<int64_t>(like.nbytes()) + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  void* const first = reinterpret_cast<void*>((address + 63) / 64 * 64);
  return at::from_blob(
      first, like.sizes(), like.strides(),
      [memory = std::move(memory)](void*) mutable { ScratchPool::instance().give_back(std::move(memory)); },
      like.options());
}

// Uninitialised pieces of equal size, each of which starts on a cache line.
class Scratch {
 public:
  Scratch(int64_t pieces, int64_t bytes)
      : stride_((bytes + 63) / 64 * 64), memory_(ScratchPool::instance().take(pieces * stride_ + 64)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr());
    first_ = reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
  ~Scratch() { ScratchPool::instance().give_back(std::move(memory_)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* operator[](int64_t piece) const { return first_ + piece * stride_; }

 private:
  int64_t stride_;
  at::Tensor memory_;
  char* first_;
};

}  // namespace mtlk
