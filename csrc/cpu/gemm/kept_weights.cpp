#include "gemm/kept_weights.h"

#include "gemm/weight_forms.h"

namespace mtlk {
KeptWeights::KeptWeights() {
  MemoryPool::instance();  // whose lock is taken under this one
  stay_free_across_forks<KeptWeights>();
}

KeptWeights& KeptWeights::instance() {
  static auto* kept = new KeptWeights;  // never destroyed: torch may be gone by then
  return *kept;
}

void KeptWeights::declare(const at::Tensor& weight) {
  if (weight.is_inference()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(entries_, [](const auto& item) { return item.second.weight.expired(); });
  entries_.insert_or_assign(
      weight.unsafeGetTensorImpl(),
      Entry{WeakTensor(weight.getIntrusivePtr()), weight.const_data_ptr(), static_cast<int64_t>(weight._version()),
            weight.sizes().vec(), weight.strides().vec(), weight.scalar_type()});
  count_ = static_cast<int64_t>(entries_.size());
}

bool KeptWeights::declared(const at::Tensor& weight) {
  if (count_ == 0) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  return find(weight) != nullptr;
}

KeptWeights::Memory KeptWeights::prepared(const at::Tensor& weight, const EngineTable& engine) {
  if (count_ == 0) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry* const entry = find(weight);
  if (entry == nullptr) return nullptr;
  TORCH_CHECK(!weight.is_inference() && weight.const_data_ptr() == entry->data &&
                  static_cast<int64_t>(weight._version()) == entry->version && weight.sizes() == entry->sizes &&
                  weight.strides() == entry->strides && weight.scalar_type() == entry->dtype,
              "mtlkernels: a weight was changed, or moved to other memory, after mtlkernels.prepare, which keeps its "
              "prepared form; prepare the model again");
  if (!entry->memory || entry->prepare != engine.prepare) {
    auto made = std::make_shared<const Scratch>(1, engine.prepared_bytes(weight.size(0), weight.size(1)), false);
    prepare_weight(engine, preparable(weight, false), (*made)[0]);
    entry->memory = std::move(made);
    entry->prepare = engine.prepare;
  }
  return entry->memory;
}

void KeptWeights::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& item : entries_) item.second.memory = nullptr;
}

KeptWeights::Entry* KeptWeights::find(const at::Tensor& weight) {
  const auto at = entries_.find(weight.unsafeGetTensorImpl());
  return at == entries_.end() || at->second.weight.expired() ? nullptr : &at->second;
}

}  // namespace mtlk
