// Gradients of a level as a backward call returns them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "level/blocking.h"
#include "runtime/memory.h"

namespace mtlk {

// What a backward call returns, and the sums of the compute type that its kernels add to where these cannot be the
// results themselves. A weight that gets its whole gradient at once has none, nor have the `direct` kernels, which
// write the results alone.
class LevelGradients {
 public:
  LevelGradients(const Level& level, at::TensorList inputs, at::TensorList weights, at::TensorList logits,
                 const EngineTable& engine, bool direct, bool need_inputs, bool need_weights, bool need_biases,
                 bool need_logits) {
    for (size_t i = 0; need_inputs && i < inputs.size(); ++i) {
      const bool read = std::count(level.expert_inputs, level.expert_inputs + level.experts, static_cast<int>(i)) > 0;
      inputs_.push_back(read ? pooled(inputs[i].sizes(), inputs[i].options(), true)
                             : at::zeros(inputs[i].sizes(), inputs[i].options()));
    }
    for (size_t k = 0; need_logits && k < logits.size(); ++k) {
      logits_.push_back(at::empty(logits[k].sizes(), logits[k].options()));
    }
    const auto compute = weights[0].options().dtype(weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    for (int l = 0; l < level.layers; ++l) sum_ld_.push_back(rounded(level.widths[l], engine.weight_sum_multiple));
    const bool at_once = direct || level.rows == 0 || level.rows <= chunk_rows(level, engine);
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t out = weights[i].size(0), ld = sum_ld_[i / level.experts];
      if (need_weights) {
        weights_.push_back(pooled(weights[i].sizes(), weights[i].options()));
        const bool fits = direct || (engine.stores_compute && ld == weights[i].size(1));
        weight_sums_.push_back(fits ? weights_.back() : at_once ? at::Tensor() : pooled({out, ld}, compute, true));
      }
      if (need_biases) {
        biases_.push_back(at::empty({out}, weights[i].options()));
        bias_sums_.push_back(direct || engine.stores_compute ? biases_.back() : at::empty({out}, compute));
      }
    }
    for (auto [tensors, pointers] : {std::pair{&inputs_, &input_pointers_},
                                     {&logits_, &logit_pointers_},
                                     {&weights_, &weight_pointers_},
                                     {&biases_, &bias_pointers_},
                                     {&weight_sums_, &weight_sum_pointers_},
                                     {&bias_sums_, &bias_sum_pointers_}}) {
      for (const at::Tensor& tensor : *tensors) {
        pointers->push_back(tensor.defined() ? tensor.mutable_data_ptr() : nullptr);
      }
    }
  }
  LevelGradients(const LevelGradients&) = delete;

  template <typename Args>
  void point(Args& args) {
    args.grad_inputs = inputs_.empty() ? nullptr : input_pointers_.data();
    args.grad_logits = logits_.empty() ? nullptr : logit_pointers_.data();
    args.need_weights = !weights_.empty();
    args.need_biases = !biases_.empty();
    args.grad_weights = weight_pointers_.data();
    args.grad_biases = bias_pointers_.data();
    args.weight_sums = weight_sum_pointers_.data();
    args.weight_sum_ld = sum_ld_.data();
    args.bias_sums = bias_sum_pointers_.data();
  }

  // The biases of one layer's experts, beginning with number `first`, have no gradient.
  void zero_biases(size_t first, size_t count) {
    for (size_t i = first; i < first + count && !biases_.empty(); ++i) biases_[i].zero_();
  }

  // Nothing has a gradient.
  void zero() {
    for (const at::Tensor& grad : weights_) grad.zero_();
    for (const at::Tensor& grad : biases_) grad.zero_();
  }

  std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
  take() {
    return {std::move(inputs_), std::move(weights_), std::move(biases_), std::move(logits_)};
  }

 private:
  static int64_t rounded(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

  std::vector<at::Tensor> inputs_, weights_, biases_, logits_, weight_sums_, bias_sums_;
  std::vector<int64_t> sum_ld_;
  std::vector<void*> input_pointers_, logit_pointers_, weight_pointers_, bias_pointers_;
  std::vector<void*> weight_sum_pointers_, bias_sum_pointers_;
};

}  // namespace mtlk
