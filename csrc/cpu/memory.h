// Memory for intermediates.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
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

// Blocks of memory kept from one call to the next: touching fresh memory costs a page fault and the kernel's zeroing,
// which is some 10% of a training step. A step's peak is what its blocks take together, so what is needed only for a
// while may take a part of a block that is idle.
class MemoryPool {
  struct Block;

 public:
  struct Piece {
    char* first;  // on a cache line
    int64_t bytes;
    Block* block;
  };

  static MemoryPool& instance() {
    static auto* pool = new MemoryPool;  // never destroyed: torch may be gone by then
    return *pool;
  }

  // The smallest idle block of at least `bytes` and at most twice as many, or a new one. Where it is `brief`, the
  // smallest idle part of a block will do, and what it leaves stays idle.
  Piece take(int64_t bytes, bool brief) {
    bytes = std::max<int64_t>(1, (bytes + 63) / 64) * 64;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = by_size_.lower_bound({bytes, nullptr}); at != by_size_.end(); ++at) {
      const auto place = idle_.find(at->second);
      if (!brief && at->first > 2 * bytes) break;
      if (!brief && !whole(place->second)) continue;
      Piece found = place->second;
      remove(place);
      if (brief && found.bytes - bytes >= kLeast) {
        insert({found.first + bytes, found.bytes - bytes, found.block});
        found.bytes = bytes;
      }
      return found;
    }
    auto block = std::make_unique<Block>();
    block->memory = with_huge_pages(at::empty({bytes + 64}, at::kByte));
    const auto address = reinterpret_cast<uintptr_t>(block->memory.mutable_data_ptr());
    block->bytes = bytes;
    return {reinterpret_cast<char*>((address + 63) / 64 * 64), bytes, block.release()};
  }

  // Keeps it for later; the largest blocks go where the pool would hold more than kMost.
  void give_back(Piece piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto next = idle_.lower_bound(piece.first);
    if (next != idle_.end() && next->second.block == piece.block && next->first == piece.first + piece.bytes) {
      piece.bytes += next->second.bytes;
      remove(next);
    }
    const auto after = idle_.lower_bound(piece.first);
    if (after != idle_.begin()) {
      const auto before = std::prev(after);
      if (before->second.block == piece.block && before->first + before->second.bytes == piece.first) {
        piece.first = before->first;
        piece.bytes += before->second.bytes;
        remove(before);
      }
    }
    insert(piece);
    for (auto at = by_size_.rbegin(); held_ > kMost && at != by_size_.rend();) {
      const auto place = idle_.find(at->second);
      ++at;
      if (whole(place->second)) at = std::make_reverse_iterator(discard(place));
    }
  }

  // Lets go of every block that waits for a later call; the number of bytes.
  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t before = held_;
    for (auto at = idle_.begin(); at != idle_.end();) {
      const auto place = at++;
      if (whole(place->second)) discard(place);
    }
    return before - held_;
  }

 private:
  struct Block {
    at::Tensor memory;
    int64_t bytes;
  };
  using Idle = std::map<char*, Piece>;
  using BySize = std::set<std::pair<int64_t, char*>>;
  static constexpr int64_t kMost = int64_t{256} << 20;
  static constexpr int64_t kLeast = 1 << 12;  // that is worth to be kept by itself

  static bool whole(const Piece& piece) { return piece.bytes == piece.block->bytes; }

  void insert(const Piece& piece) {
    idle_.emplace(piece.first, piece);
    by_size_.emplace(piece.bytes, piece.first);
    held_ += piece.bytes;
  }

  // Returns what follows by size.
  BySize::iterator remove(Idle::iterator place) {
    const Piece& piece = place->second;
    held_ -= piece.bytes;
    const auto following = by_size_.erase(by_size_.find({piece.bytes, piece.first}));
    idle_.erase(place);
    return following;
  }
  BySize::iterator discard(Idle::iterator place) {
    const std::unique_ptr<Block> block(place->second.block);
    return remove(place);
  }

  std::mutex mutex_;
  Idle idle_;
  BySize by_size_;
  int64_t held_ = 0;
};

// An uninitialised tensor whose memory goes back to the pool when its last user is gone, for results that are made at
// every step and dropped before the next; `brief` where they are dropped at once.
inline at::Tensor pooled(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options,
                         bool brief = false) {
  constexpr int64_t kSmall = 1 << 14;
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kSmall) return at::empty_strided(sizes, strides, options);
  const MemoryPool::Piece piece = MemoryPool::instance().take(bytes, brief);
  const auto give_back = [piece](void*) { MemoryPool::instance().give_back(piece); };
  at::Tensor result = at::from_blob(piece.first, sizes, strides, give_back, options);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    result.fill_(std::numeric_limits<double>::quiet_NaN());  // as fresh memory is filled then
  }
  return result;
}

inline at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options, bool brief = false) {
  return pooled(sizes, c10::contiguous_strides(sizes), options, brief);
}

// Uninitialised pieces of equal size, each of which starts on a cache line.
class Scratch {
 public:
  Scratch(int64_t pieces, int64_t bytes, bool brief = true)
      : stride_((bytes + 63) / 64 * 64), memory_(MemoryPool::instance().take(pieces * stride_, brief)) {}
  ~Scratch() { MemoryPool::instance().give_back(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* operator[](int64_t piece) const { return memory_.first + piece * stride_; }

 private:
  int64_t stride_;
  MemoryPool::Piece memory_;
};

}  // namespace mtlk
