// Weights in their prepared form, kept from one call to the next: only those that a user has declared frozen, by
// mtlkernels.prepare.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "gemm/engine.h"
#include "runtime/api.h"
#include "runtime/forks.h"
#include "runtime/memory.h"

namespace mtlk {

class MTLK_API KeptWeights {
 public:
  using Memory = std::shared_ptr<const Scratch>;

  static KeptWeights& instance();

  // Says that nobody writes to this weight any more, as long as it lives. Of no effect for one that was made under
  // torch.inference_mode, of which writes are not counted.
  void declare(const at::Tensor& weight);

  bool declared(const at::Tensor& weight);

  // What an engine prepares of a weight that was declared, made by the first call; null for any other. Throws where the
  // weight has changed since, as far as that is counted. The version was read when it was declared, before anything was
  // prepared of it, so that a write at any time after that counts.
  Memory prepared(const at::Tensor& weight, const EngineTable& engine);

  std::mutex& mutex() { return mutex_; }

  // Lets go of what was prepared; it is made again when it is needed.
  void release();

 private:
  KeptWeights();

  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Entry {
    WeakTensor weight;
    const void* data;
    int64_t version;
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    decltype(EngineTable::prepare) prepare = nullptr;
    Memory memory = nullptr;
  };

  Entry* find(const at::Tensor& weight);

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Entry> entries_;
  std::atomic<int64_t> count_{0};
};

}  // namespace mtlk
