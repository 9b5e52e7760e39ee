#include "runtime/memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <c10/util/accumulate.h>
#include <c10/util/strides.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>

#include "runtime/forks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mtlk {
namespace {

constexpr int64_t kLittle = int64_t{256} << 20;  // which the pool may hold whatever is in use
constexpr int64_t kLeast = 1 << 12;              // that is worth to be kept by itself
constexpr int64_t kPeriod = 4096;                // pieces that are taken, some dozens of training steps

// Asks for huge pages under a large fresh tensor: touching it then costs a page fault for every 2 MiB instead of every
// 4 KiB, which is some 10% of a training step. The kernel may ignore it.
at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + tensor.nbytes()) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace

MemoryPool& MemoryPool::instance() {
  static auto* pool = new MemoryPool;  // never destroyed: torch may be gone by then
  return *pool;
}

MemoryPool::MemoryPool() { stay_free_across_forks<MemoryPool>(); }

MemoryPool::Piece::Piece(char* first, const Part& part) {
  Idle idle;
  idle.emplace(first, part);
  BySize sizes;
  sizes.emplace(part.bytes, first);
  entry_ = idle.extract(idle.begin());
  size_ = sizes.extract(sizes.begin());
}

MemoryPool::Piece MemoryPool::take(int64_t bytes, bool brief) {
  bytes = std::max<int64_t>(1, (bytes + 63) / 64) * 64;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto at = by_size_.lower_bound({bytes, nullptr}); at != by_size_.end(); ++at) {
    const auto place = idle_.find(at->second);
    if (!brief && at->first > 2 * bytes) break;
    if (!brief && !whole(place->second)) continue;
    const int64_t left = at->first - bytes;
    if (!brief || left < kLeast) return used(remove(place));
    Piece rest(place->first + bytes, {left, place->second.block});  // may fail, before anything has changed
    Piece found = remove(place);
    resize(found, bytes);
    insert(std::move(rest));
    return used(std::move(found));
  }
  hold_at_most(most_idle(in_use_ + bytes));
  return used(fresh(bytes));
}

MemoryPool::Piece MemoryPool::used(Piece piece) {
  if (++taken_ % kPeriod == 0) {
    peaks_[2] = std::exchange(peaks_[0], 0);
    peaks_[3] = std::exchange(peaks_[1], 0);
  }
  in_use_ += piece.part().bytes;
  peak_ = std::max(peak_, in_use_);
  return piece;
}

void MemoryPool::unused(int64_t bytes) {
  in_use_ -= bytes;
  if (in_use_ >= peak_ / 2) return;
  peaks_[1] = std::max(peaks_[1], std::min(peaks_[0], peak_));
  peaks_[0] = std::max(peaks_[0], peak_);
  peak_ = in_use_;
}

int64_t MemoryPool::most_idle(int64_t in_use) const {
  std::array<int64_t, 5> peaks{peaks_[0], peaks_[1], peaks_[2], peaks_[3], std::max(peak_, in_use)};
  std::nth_element(peaks.begin(), peaks.begin() + 1, peaks.end(), std::greater<>());
  return std::max(kLittle, peaks[1] + peaks[1] / 4 - in_use);
}

void MemoryPool::hold_at_most(int64_t bytes) {
  while (held_ > bytes && discard_largest()) {
  }
}

MemoryPool::Piece MemoryPool::fresh(int64_t bytes) {
  auto block = std::make_unique<Block>();
  block->memory = with_huge_pages(at::empty({bytes + 64}, at::kByte));
  block->bytes = bytes;
  const auto address = reinterpret_cast<uintptr_t>(block->memory.mutable_data_ptr());
  Piece piece(reinterpret_cast<char*>((address + 63) / 64 * 64), {bytes, block.get()});
  poison(block->memory.const_data_ptr(), block->memory.nbytes());
  block.release();
  return piece;
}

void MemoryPool::give_back(Piece piece) noexcept {
  poison(piece.first(), piece.part().bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t most = most_idle(in_use_ - piece.part().bytes);  // by this peak too, which may end now
  unused(piece.part().bytes);
  const auto next = idle_.lower_bound(piece.first());
  if (next != idle_.end() && adjoin({piece.first(), piece.part()}, *next)) {
    const int64_t bytes = next->second.bytes;
    remove(next);
    resize(piece, piece.part().bytes + bytes);
  }
  const auto after = idle_.lower_bound(piece.first());
  if (after != idle_.begin() && adjoin(*std::prev(after), {piece.first(), piece.part()})) {
    const int64_t bytes = piece.part().bytes;
    piece = remove(std::prev(after));
    resize(piece, piece.part().bytes + bytes);
  }
  insert(std::move(piece));
  hold_at_most(most);
}

int64_t MemoryPool::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t before = held_;
  hold_at_most(0);
  peaks_ = {};
  peak_ = in_use_;
  return before - held_;
}

// Whether two parts are of one block, the second right behind the first.
bool MemoryPool::adjoin(const Idle::value_type& part, const Idle::value_type& next) {
  return part.second.block == next.second.block && part.first + part.second.bytes == next.first;
}

void MemoryPool::insert(Piece piece) {
  held_ += piece.part().bytes;
  idle_.insert(std::move(piece.entry_));
  by_size_.insert(std::move(piece.size_));
}

MemoryPool::Piece MemoryPool::remove(Idle::iterator place) {
  held_ -= place->second.bytes;
  BySize::node_type size = by_size_.extract({place->second.bytes, place->first});
  return {idle_.extract(place), std::move(size)};
}

// The largest block of which no part is in use; whether there is one.
bool MemoryPool::discard_largest() {
  for (auto at = by_size_.rbegin(); at != by_size_.rend(); ++at) {
    const auto place = idle_.find(at->second);
    if (!whole(place->second)) continue;
    const std::unique_ptr<Block> block(place->second.block);
    remove(place);
    unpoison(block->memory.const_data_ptr(), block->memory.nbytes());
    return true;
  }
  return false;
}

at::Tensor pooled(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options, bool brief) {
  constexpr size_t kSmall = 1 << 14, kMost = std::numeric_limits<size_t>::max() / 4;
  // Throws where that overflows, as many rows that lie in one place make it; a blob's own check would end the process.
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, options.dtype().itemsize());
  if (bytes < kSmall || bytes > kMost) return at::empty_strided(sizes, strides, options);
  auto memory = std::make_unique<Scratch>(1, static_cast<int64_t>(bytes), brief);
  void* const first = (*memory)[0];
  const auto give_back = [](void* context) { delete static_cast<Scratch*>(context); };  // a function would be allocated
  // Who resizes it gets PyTorch's memory instead.
  at::Tensor result = at::for_blob(first, sizes)
                          .strides(strides)
                          .options(options)
                          .context(memory.release(), give_back)
                          .allocator(c10::GetAllocator(c10::kCPU))
                          .resizeable_storage()
                          .make_tensor();
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    // As fresh memory is filled then.
    result.fill_(result.is_floating_point() ? std::numeric_limits<double>::quiet_NaN() : 255);
  }
  return result;
}

at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options, bool brief) {
  return pooled(sizes, c10::contiguous_strides(sizes), options, brief);
}

}  // namespace mtlk
