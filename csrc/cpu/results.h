// Gradients of a level as a backward call returns them.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace mtlk {

// What a backward call returns, and the sums that its kernels add to where these cannot be the results themselves,
// unless the kernels write those (`direct`).
class Results {
 public:
  Results(const Level& level, at::TensorList inputs, at::TensorList weights, at::TensorList logits,
          const ExpertMixtureKernels& table, bool direct, bool need_inputs, bool need_weights, bool need_biases,
          bool need_logits) {
    for (size_t i = 0; need_inputs && i < inputs.size(); ++i) {
      const bool read = std::count(level.expert_inputs, level.expert_inputs + level.experts, static_cast<int>(i)) > 0;
      inputs_.push_back(read ? pooled(inputs[i].sizes(), inputs[i].options())
                             : at::zeros(inputs[i].sizes(), inputs[i].options()));
    }
    for (size_t k = 0; need_logits && k < logits.size(); ++k) {
      logits_.push_back(at::empty(logits[k].sizes(), logits[k].options()));
    }
    const auto compute = weights[0].options().dtype(weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    for (int l = 0; l < level.layers; ++l) {
      const int64_t multiple = table.weight_sum_multiple;
      sum_ld_.push_back((level.widths[l] + multiple - 1) / multiple * multiple);
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t out = weights[i].size(0), ld = sum_ld_[i / level.experts];
      if (need_weights) {
        weights_.push_back(pooled(weights[i].sizes(), weights[i].options()));
        const bool fits = direct || (table.stores_compute && ld == weights[i].size(1));
        weight_sums_.push_back(fits ? weights_.back() : pooled({out, ld}, compute));
      }
      if (need_biases) {
        biases_.push_back(at::empty({out}, weights[i].options()));
        bias_sums_.push_back(direct || table.stores_compute ? biases_.back() : at::empty({out}, compute));
      }
    }
    for (auto [tensors, pointers] : {std::pair{&inputs_, &input_pointers_},
                                     {&logits_, &logit_pointers_},
                                     {&weight_sums_, &weight_pointers_},
                                     {&bias_sums_, &bias_pointers_}}) {
      for (const at::Tensor& tensor : *tensors) pointers->push_back(tensor.mutable_data_ptr());
    }
  }
  Results(const Results&) = delete;

  template <typename Args>
  void point(Args& args) {
    args.grad_inputs = inputs_.empty() ? nullptr : input_pointers_.data();
    args.grad_logits = logits_.empty() ? nullptr : logit_pointers_.data();
    args.need_weights = !weights_.empty();
    args.need_biases = !biases_.empty();
    args.weight_sums = weight_pointers_.data();
    args.weight_sum_ld = sum_ld_.data();
    args.bias_sums = bias_pointers_.data();
  }

  // The biases of one layer's experts, beginning with number `first`, have no gradient.
  void zero_biases(size_t first, size_t count) {
    for (size_t i = first; i < first + count && !bias_sums_.empty(); ++i) bias_sums_[i].zero_();
  }

  void zero_sums() {
    for (const at::Tensor& sum : weight_sums_) sum.zero_();
    for (const at::Tensor& sum : bias_sums_) sum.zero_();
  }

  void write_sums(const ExpertMixtureKernels& table) {
    const auto write = [&](const std::vector<at::Tensor>& sums, const std::vector<at::Tensor>& results) {
      parallel_tasks(at::get_num_threads(), results.size(), [&](int64_t i) {
        const at::Tensor &sum = sums[i], &result = results[i];
        if (sum.is_same(result)) return;
        const bool matrix = result.dim() == 2;
        table.write_sums(sum.const_data_ptr(), matrix ? sum.size(1) : sum.size(0), matrix ? result.size(0) : 1,
                         matrix ? result.size(1) : result.size(0), result.mutable_data_ptr());
      });
    };
    write(weight_sums_, weights_);
    write(bias_sums_, biases_);
  }

  std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
  take() {
    return {std::move(inputs_), std::move(weights_), std::move(biases_), std::move(logits_)};
  }

 private:
  std::vector<at::Tensor> inputs_, weights_, biases_, logits_, weight_sums_, bias_sums_;
  std::vector<int64_t> sum_ld_;
  std::vector<void*> input_pointers_, logit_pointers_, weight_pointers_, bias_pointers_;
};

}  // namespace mtlk
