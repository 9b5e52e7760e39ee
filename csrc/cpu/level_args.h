// Builds the kernels' view of a level of experts from an operator's arguments.
#pragma once

#include <algorithm>
#include <numeric>

#include "gates_args.h"
#include "kernels.h"
#include "parallel.h"

namespace mtlk {

using BiasList = const c10::List<std::optional<at::Tensor>>&;

// Owns what a Level points to, and whatever had to be copied to fit the kernels.
class LevelTables {
 public:
  LevelTables(at::TensorList inputs, at::TensorList weights, at::TensorList gate_logits, at::IntArrayRef expert_inputs,
              at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, at::IntArrayRef activations)
      : gates_(gate_logits, gate_experts, gate_sizes, static_cast<int64_t>(expert_inputs.size())),
        experts_(expert_inputs.size()),
        activations_(activations.begin(), activations.end()),
        expert_inputs_(expert_inputs.begin(), expert_inputs.end()),
        order_(experts_) {
    TORCH_CHECK_VALUE(weights.size() == experts_ * activations_.size(), "mtlkernels: weights must hold ",
                      experts_ * activations_.size(), " tensors, got ", weights.size());
    widths_.push_back(inputs[0].size(1));
    for (size_t l = 0; l < activations_.size(); ++l) widths_.push_back(weights[l * experts_].size(0));
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return expert_inputs_[a] < expert_inputs_[b]; });
    for (const at::Tensor& x : inputs) {
      rows_of(x);
      input_pointers_.push_back(kept_.back().const_data_ptr());
      input_ld_.push_back(kept_.back().stride(0));
    }
    biases_.assign(weights.size(), nullptr);
    level_.rows = inputs[0].size(0);
    level_.experts = static_cast<int>(experts_);
    level_.layers = static_cast<int>(activations_.size());
    level_.widths = widths_.data();
    level_.activations = activations_.data();
    level_.expert_inputs = expert_inputs_.data();
    level_.order = order_.data();
    level_.inputs = input_pointers_.data();
    level_.input_ld = input_ld_.data();
    level_.biases = biases_.data();
    level_.gates = gates_.gates();
  }
  LevelTables(const LevelTables&) = delete;

  const Level& level() const { return level_; }

  // A tensor [rows, n] with unit column stride, kept alive as long as this; the last one kept.
  void rows_of(const at::Tensor& x) { kept_.push_back(x.stride(1) == 1 ? x : x.contiguous()); }
  const at::Tensor& last_kept() const { return kept_.back(); }

  void set_biases(BiasList biases) {
    for (size_t i = 0; i < biases.size(); ++i) {
      const std::optional<at::Tensor> bias = biases.get(i);
      if (!bias) continue;
      kept_.push_back(bias->contiguous());
      biases_[i] = kept_.back().const_data_ptr();
    }
  }

  // Weights in the form that the kernels want; `transposed` swaps inputs and outputs.
  void set_weights(at::TensorList weights, WeightForm form, bool transposed) {
    weights_.resize(weights.size());
    weight_ld_.resize(weights.size());
    std::vector<at::Tensor> ready(weights.size());
    parallel_tasks(form == WeightForm::kNatural ? 1 : at::get_num_threads(), weights.size(), [&](int64_t i) {
      ready[i] = with_form(transposed ? weights[i].t() : weights[i], form);
    });
    for (size_t i = 0; i < weights.size(); ++i) {
      weights_[i] = ready[i].const_data_ptr();
      weight_ld_[i] = ready[i].stride(0);
      kept_.push_back(std::move(ready[i]));
    }
    level_.weights = weights_.data();
    level_.weight_ld = weight_ld_.data();
  }

 private:
  static at::Tensor with_form(const at::Tensor& weight, WeightForm form) {
    switch (form) {
      case WeightForm::kCompute:
        return weight.to(at::kFloat).contiguous();
      case WeightForm::kPadded: {
        const int64_t out = (weight.size(0) + 15) / 16 * 16, in = (weight.size(1) + 31) / 32 * 32;
        if (out == weight.size(0) && in == weight.size(1)) break;
        at::Tensor padded = at::zeros({out, in}, weight.options());
        padded.narrow(0, 0, weight.size(0)).narrow(1, 0, weight.size(1)).copy_(weight);
        return padded;
      }
      case WeightForm::kNatural:
        break;
    }
    return weight.stride(1) == 1 ? weight : weight.contiguous();
  }

  GateTables gates_;
  size_t experts_;
  std::vector<int> activations_, expert_inputs_, order_;
  std::vector<int64_t> widths_, input_ld_, weight_ld_;
  std::vector<const void*> input_pointers_, weights_, biases_;
  std::vector<at::Tensor> kept_;
  Level level_;
};

}  // namespace mtlk
