// Weights in their prepared form, kept from one call to the next: only those that a user has declared frozen, by
// mtlkernels.prepare.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "gemm/engine.h"
#include "runtime/forks.h"
#include "runtime/memory.h"

namespace mtlk {

class KeptWeights {
 public:
  using Memory = std::shared_ptr<const Scratch>;

  static KeptWeights& instance() {
    static auto* kept = new KeptWeights;  // never destroyed: torch may be gone by then
    return *kept;
  }

  // Says that nobody writes to this weight any more, as long as it lives.
  void declare(const at::Tensor& weight) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(entries_, [](const auto& item) { return item.second.weight.expired(); });
    entries_.insert_or_assign(weight.unsafeGetTensorImpl(),
                              Entry{WeakTensor(weight.getIntrusivePtr()), weight.const_data_ptr(), version_of(weight)});
    count_ = static_cast<int64_t>(entries_.size());
  }

  bool declared(const at::Tensor& weight) {
    if (count_ == 0) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    return find(weight) != nullptr;
  }

  // What these kernels prepare of a weight that was declared, made by the first call; null for any other. Throws where
  // the weight has changed since, as far as that is counted. The version was read when it was declared, before anything
  // was prepared of it, so that a write at any time after that counts.
  template <typename F>
  Memory prepared(const at::Tensor& weight, const EngineTable& engine, F make) {
    if (count_ == 0) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry* const entry = find(weight);
    if (entry == nullptr) return nullptr;
    TORCH_CHECK(weight.const_data_ptr() == entry->data && version_of(weight) == entry->version,
                "mtlkernels: a weight was changed after mtlkernels.prepare, which keeps its prepared form; prepare the "
                "model again");
    if (!entry->memory || entry->prepare != engine.prepare) {
      entry->memory = make();
      entry->prepare = engine.prepare;
    }
    return entry->memory;
  }

  std::mutex& mutex() { return mutex_; }

  // Lets go of what was prepared; it is made again when it is needed.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& item : entries_) item.second.memory = nullptr;
  }

 private:
  KeptWeights() {
    MemoryPool::instance();  // whose lock is taken under this one
    stay_free_across_forks<KeptWeights>();
  }

  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    WeakTensor weight;
    const void* data;
    int64_t version;
    decltype(EngineTable::prepare) prepare = nullptr;
    Memory memory = nullptr;
  };

  static int64_t version_of(const at::Tensor& weight) {
    return weight.is_inference() ? 0 : static_cast<int64_t>(weight._version());
  }

  Entry* find(const at::Tensor& weight) {
    const auto at = entries_.find(weight.unsafeGetTensorImpl());
    return at == entries_.end() || at->second.weight.expired() ? nullptr : &at->second;
  }

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Entry> entries_;
  std::atomic<int64_t> count_{0};
};

}  // namespace mtlk
