// Memory for intermediates.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <utility>

#include "runtime/api.h"
#include "runtime/poison.h"

namespace mtlk {

// Blocks of memory kept from one call to the next: touching fresh memory costs a page fault and the kernel's zeroing,
// which is some 10% of a training step. A step's peak is what its blocks take together, so what is needed only for a
// while may take a part of a block that is idle. What is idle is at most 256 MiB; or, with what is in use, a quarter
// more than was in use at once twice lately, so that a step of any size finds what the last one left.
class MTLK_API MemoryPool {
  struct Block {
    at::Tensor memory;
    int64_t bytes;
  };
  struct Part {
    int64_t bytes;
    Block* block;
  };
  using Idle = std::map<char*, Part>;
  using BySize = std::set<std::pair<int64_t, char*>>;

 public:
  // A part of a block in use. It brings the entries that it will have among the idle ones, since giving it back, which
  // destructors do, must not fail for want of memory.
  class Piece {
   public:
    char* first() const { return entry_.key(); }  // on a cache line

   private:
    friend MemoryPool;
    Part& part() const { return entry_.mapped(); }
    Piece(char* first, const Part& part);
    Piece(Idle::node_type entry, BySize::node_type size) : entry_(std::move(entry)), size_(std::move(size)) {}

    Idle::node_type entry_;
    BySize::node_type size_;
  };

  static MemoryPool& instance();

  // The smallest idle block of at least `bytes` and at most twice as many, or a new one. Where it is `brief`, the
  // smallest idle part of a block will do, and what it leaves stays idle.
  Piece take(int64_t bytes, bool brief);

  // Keeps it for later; the largest blocks go where too much is idle.
  void give_back(Piece piece) noexcept;

  // Lets go of every block that waits for a later call, and of what was in use lately; the number of bytes.
  int64_t release();

  std::mutex& mutex() { return mutex_; }

 private:
  MemoryPool();

  static bool whole(const Part& part) { return part.bytes == part.block->bytes; }
  static bool adjoin(const Idle::value_type& part, const Idle::value_type& next);
  static void resize(Piece& piece, int64_t bytes) { piece.entry_.mapped().bytes = piece.size_.value().first = bytes; }
  static Piece fresh(int64_t bytes);
  void insert(Piece piece);
  Piece remove(Idle::iterator place);
  Piece used(Piece piece);                  // counts it
  void unused(int64_t bytes);               // no more
  int64_t most_idle(int64_t in_use) const;  // bytes, beside so many
  void hold_at_most(int64_t bytes);         // idle ones
  bool discard_largest();

  std::mutex mutex_;
  Idle idle_;
  BySize by_size_;
  int64_t held_ = 0, in_use_ = 0;  // bytes
  int64_t taken_ = 0;              // pieces

  // The most that was in use at once since there was half of a peak before it; and the two highest of such peaks in
  // this period, then in the one before.
  int64_t peak_ = 0;
  std::array<int64_t, 4> peaks_{};
};

// Uninitialised pieces of equal size, each of which starts on a cache line. What the pool has is poisoned but for them.
class Scratch {
 public:
  Scratch(int64_t pieces, int64_t bytes, bool brief = true) : stride_(padded(bytes)) {
    if (pieces * stride_ > 0) memory_.emplace(MemoryPool::instance().take(pieces * stride_, brief));
    for (int64_t i = 0; memory_ && i < pieces; ++i) unpoison(memory_->first() + i * stride_, bytes);
  }
  ~Scratch() {
    if (memory_) MemoryPool::instance().give_back(std::move(*memory_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* operator[](int64_t piece) const { return memory_ ? memory_->first() + piece * stride_ : empty_; }

 private:
  alignas(64) static inline char empty_[64];  // pieces without bytes are not null either
  int64_t stride_;
  std::optional<MemoryPool::Piece> memory_;
};

// An uninitialised tensor whose memory goes back to the pool when its last user is gone, for results that are made at
// every step and dropped before the next; `brief` where they are dropped at once.
at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options, bool brief = false);
at::Tensor pooled(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options, bool brief = false);

}  // namespace mtlk
