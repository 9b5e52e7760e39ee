// Weights in the form that an engine wants.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "gemm/engine.h"
#include "gemm/kept_weights.h"
#include "runtime/memory.h"

namespace mtlk {

// A weight as it can be prepared: one of its strides is 1.
at::Tensor preparable(const at::Tensor& weight, bool transposed);
void prepare_weight(const EngineTable& engine, const at::Tensor& weight, void* memory);

// Whether nobody writes to any of them any more.
bool all_declared(at::TensorList weights);

// Whether what an engine prepares of declared weights is kept: of one that takes most weights as they lie, it is not.
inline bool keeps_prepared(const EngineTable& engine) {
  return engine.form == WeightForm::kPrepared && engine.natural_outputs == 0;
}

// Owns whatever had to be copied to fit the kernels.
class WeightForms {
 public:
  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }
  const int64_t* columns() const { return columns_.empty() ? nullptr : columns_.data(); }

  // Weights as they are, for kernels that read rows of the storage type.
  void set_natural(at::TensorList weights);

  // Weights for a forward pass that makes what is in no fitting form.
  void set_to_be_made(at::TensorList weights, const EngineTable& engine);

  // Weights in the form that the engine wants; `transposed` swaps inputs and outputs where they are prepared.
  void set(at::TensorList weights, const EngineTable& engine, bool transposed);

 private:
  void prepare(at::TensorList weights, const EngineTable& engine, bool transposed);

  std::vector<at::Tensor> kept_;
  std::vector<KeptWeights::Memory> frozen_;
  std::optional<Scratch> prepared_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_, columns_;
};

// Prepared weights of a few experts at a time, where all rows are done with them at once: in memory that the next ones
// take over, instead of all experts' together.
class GroupForms {
 public:
  // `weights` by layer, then expert.
  GroupForms(at::TensorList weights, int experts, const EngineTable& engine, bool transposed);

  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }

  // Of an expert.
  int64_t bytes() const { return bytes_; }
  int64_t layers() const { return static_cast<int64_t>(offsets_.size()); }

  void prepare(int64_t layer, int expert, char* memory);

 private:
  int experts_;
  const EngineTable& engine_;
  std::vector<at::Tensor> weights_;
  std::vector<int64_t> offsets_;  // of the layers
  int64_t bytes_ = 0;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_;
};

}  // namespace mtlk
