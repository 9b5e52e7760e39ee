// Prepared weights, kept from one call to the next while nobody changes them.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "memory.h"

namespace mtlk {

// What a weight was when it was prepared. A weak reference to its storage tells whether the memory has been given to
// another since; the version counts what PyTorch writes. A sample of its values shows most of what is written past the
// version, such as to `.data`.
class WeightIdentity {
 public:
  explicit WeightIdentity(const at::Tensor& weight)
      : storage_(weight.storage().getWeakStorageImpl()),
        data_(weight.const_data_ptr()),
        rows_(weight.size(0)),
        columns_(weight.size(1)),
        row_stride_(weight.stride(0)),
        column_stride_(weight.stride(1)),
        version_(weight._version()),
        sample_(sample(weight)) {}

  bool same_place(const at::Tensor& weight) const {
    return weight.const_data_ptr() == data_ && weight.size(0) == rows_ && weight.size(1) == columns_ &&
           weight.stride(0) == row_stride_ && weight.stride(1) == column_stride_ && !storage_.expired();
  }
  bool unchanged(const at::Tensor& weight) const {
    return same_place(weight) && weight._version() == version_ && sample(weight) == sample_;
  }
  bool expired() const { return storage_.expired(); }

  // Whether changes can be told: not to what other processes, NumPy or a file may write, nor without a version.
  static bool tells(const at::Tensor& weight) {
    const auto deleter = weight.storage().data_ptr().get_deleter();
    return !weight.is_inference() && deleter == c10::GetCPUAllocator()->raw_deleter();
  }

 private:
  static uint64_t sample(const at::Tensor& weight) {
    constexpr int64_t kValues = 64;
    const char* first = static_cast<const char*>(weight.const_data_ptr());
    const int64_t rows = weight.size(0), columns = weight.size(1), bytes = weight.element_size();
    if (rows == 0 || columns == 0) return 0;
    const int64_t row_step = std::max<int64_t>(1, rows / kValues),
                  column_step = std::max<int64_t>(1, columns / kValues);
    uint64_t hash = 0;
    for (int64_t i = 0; i < kValues; ++i) {  // along a diagonal, so that many rows and columns are seen
      const int64_t row = i * row_step % rows, column = i * column_step % columns;
      uint64_t bits = 0;
      std::memcpy(&bits, first + (row * weight.stride(0) + column * weight.stride(1)) * bytes, bytes);
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    }
    return hash;
  }

  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  int64_t rows_, columns_, row_stride_, column_stride_;
  int64_t version_;
  uint64_t sample_;
};

// Of each list of weights that calls without gradients have brought, the least recently used go first. What comes once
// is only noted: weights that are trained between the calls would be prepared for nothing.
class PreparedWeights {
 public:
  using Prepare = void (*)(const void*, int64_t, int64_t, int64_t, int64_t, void*);
  using Memory = std::shared_ptr<const Scratch>;

  struct Found {
    bool told = false;   // whether changes to these weights can be told
    bool again = false;  // the same weights have come before, so that keeping what is prepared now pays
    Memory memory;       // null where there is none yet
  };

  static PreparedWeights& instance() {
    static auto* kept = new PreparedWeights;  // never destroyed: torch may be gone by then
    return *kept;
  }

  Found find(at::TensorList weights, Prepare prepare) {
    if (!std::all_of(weights.begin(), weights.end(), WeightIdentity::tells)) return {};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
      return entry.prepare == prepare && same(entry, weights, &WeightIdentity::same_place);
    });
    if (at != entries_.end() && same(*at, weights, &WeightIdentity::unchanged)) {
      entries_.splice(entries_.begin(), entries_, at);
      return {true, true, at->memory};
    }
    if (at != entries_.end()) entries_.erase(at);
    std::list<Entry> noted;  // on its own until it is whole: there may be no memory for it
    noted.push_front({prepare, {}, nullptr, 0});
    for (const at::Tensor& weight : weights) noted.front().weights.emplace_back(weight);
    entries_.splice(entries_.begin(), noted);
    trim();
    return {true, false, nullptr};
  }

  // Keeps `bytes` of what was prepared from weights that `find` has found again.
  void keep(at::TensorList weights, Prepare prepare, Memory memory, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Entry& entry : entries_) {
      if (entry.prepare != prepare || !same(entry, weights, &WeightIdentity::unchanged)) continue;
      entry.memory = std::move(memory);
      entry.bytes = bytes;
      return trim();
    }
  }

  // Lets go of all of them.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.clear();
  }

  std::mutex& mutex() { return mutex_; }

 private:
  PreparedWeights() {
    MemoryPool::instance();  // whose lock is taken under this one
    stay_free_across_forks<PreparedWeights>();
  }

  struct Entry {
    Prepare prepare;
    std::vector<WeightIdentity> weights;
    Memory memory;
    int64_t bytes;
  };
  static constexpr size_t kMostEntries = 64;
  static constexpr int64_t kMostBytes = int64_t{256} << 20;

  static bool same(const Entry& entry, at::TensorList weights, bool (WeightIdentity::*test)(const at::Tensor&) const) {
    if (entry.weights.size() != weights.size()) return false;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (!(entry.weights[i].*test)(weights[i])) return false;
    }
    return true;
  }

  void trim() {
    entries_.remove_if([](const Entry& entry) { return entry.weights.front().expired(); });
    int64_t bytes = 0;
    for (const Entry& entry : entries_) bytes += entry.bytes;
    while (entries_.size() > kMostEntries || (bytes > kMostBytes && entries_.size() > 1)) {
      bytes -= entries_.back().bytes;
      entries_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Entry> entries_;  // the last used first
};

}  // namespace mtlk
