// Weights in the form that a set of kernels wants.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "prepared_weights.h"

namespace mtlk {

// A weight as it can be prepared: one of its strides is 1.
inline at::Tensor preparable(const at::Tensor& weight, bool transposed) {
  const at::Tensor plain = weight.stride(1) != 1 && weight.stride(0) != 1 ? weight.contiguous() : weight;
  return transposed ? plain.t() : plain;
}

inline void prepare_weight(const ExpertMixtureKernels& table, const at::Tensor& weight, void* memory) {
  table.prepare(weight.const_data_ptr(), weight.stride(0), weight.stride(1), weight.size(0), weight.size(1), memory);
}

// Owns whatever had to be copied to fit the kernels.
class WeightForms {
 public:
  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }

  // Weights as they are, for kernels that read rows of the storage type.
  void set_natural(at::TensorList weights) {
    for (const at::Tensor& weight : weights) {
      kept_.push_back(weight.stride(1) == 1 ? weight : weight.contiguous());
      pointers_.push_back(kept_.back().const_data_ptr());
      ld_.push_back(kept_.back().stride(0));
    }
  }

  // Weights in the form that the kernels want; `transposed` swaps inputs and outputs where they are prepared, `ready`
  // is what was prepared of them before, and `kept` tells that somebody may keep it for later calls.
  void set(at::TensorList weights, const ExpertMixtureKernels& table, bool transposed,
           PreparedWeights::Memory ready = nullptr, bool kept = false) {
    if (table.form == WeightForm::kNatural) return set_natural(weights);
    if (table.form == WeightForm::kCompute) {
      std::vector<at::Tensor> wide(weights.size());
      parallel_tasks(at::get_num_threads(), weights.size(),
                     [&](int64_t i) { wide[i] = weights[i].to(at::kFloat).contiguous(); });
      return set_natural(wide);
    }
    std::vector<int64_t> offsets{0};
    for (const at::Tensor& weight : weights) {
      const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
      offsets.push_back(offsets.back() + table.prepared_bytes(outputs, inputs));
    }
    bytes_ = offsets.back();
    prepared_ = ready ? std::move(ready) : prepare(weights, table, transposed, offsets, kept);
    for (size_t i = 0; i < weights.size(); ++i) {
      pointers_.push_back(static_cast<char*>((*prepared_)[0]) + offsets[i]);
    }
    ld_.assign(weights.size(), 0);
  }

  // What `set` has prepared, and its size.
  const PreparedWeights::Memory& prepared() const { return prepared_; }
  int64_t bytes() const { return bytes_; }

 private:
  static PreparedWeights::Memory prepare(at::TensorList weights, const ExpertMixtureKernels& table, bool transposed,
                                         const std::vector<int64_t>& offsets, bool kept) {
    auto prepared = std::make_shared<const Scratch>(1, offsets.back(), !kept);
    char* memory = static_cast<char*>((*prepared)[0]);
    std::vector<at::Tensor> plain;
    for (const at::Tensor& weight : weights) plain.push_back(preparable(weight, transposed));
    parallel_tasks(at::get_num_threads(), weights.size(),
                   [&](int64_t i) { prepare_weight(table, plain[i], memory + offsets[i]); });
    return prepared;
  }

  std::vector<at::Tensor> kept_;
  PreparedWeights::Memory prepared_;
  int64_t bytes_ = 0;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_;
};

// Prepared weights of a few experts at a time, where all rows are done with them at once: in memory that the next ones
// take over, instead of all experts' together.
class GroupForms {
 public:
  // `weights` by layer, then expert.
  GroupForms(at::TensorList weights, int experts, const ExpertMixtureKernels& table, bool transposed)
      : experts_(experts), table_(table), pointers_(weights.size()), ld_(weights.size()) {
    for (const at::Tensor& weight : weights) weights_.push_back(preparable(weight, transposed));
    for (size_t i = 0; i < weights_.size(); i += experts) {
      offsets_.push_back(bytes_);
      bytes_ += table.prepared_bytes(weights_[i].size(0), weights_[i].size(1));
    }
  }

  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }

  // Of an expert.
  int64_t bytes() const { return bytes_; }
  int64_t layers() const { return static_cast<int64_t>(offsets_.size()); }

  void prepare(int64_t layer, int expert, char* memory) {
    const size_t i = layer * experts_ + expert;
    prepare_weight(table_, weights_[i], memory + offsets_[layer]);
    pointers_[i] = memory + offsets_[layer];
  }

 private:
  int experts_;
  const ExpertMixtureKernels& table_;
  std::vector<at::Tensor> weights_;
  std::vector<int64_t> offsets_;  // of the layers
  int64_t bytes_ = 0;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_;
};

}  // namespace mtlk
