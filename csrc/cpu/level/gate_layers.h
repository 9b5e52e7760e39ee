// Gates that are linear layers of the inputs: gate k reads input k, or the only one.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace mtlk {

inline const at::Tensor& read_by_gate(at::TensorList inputs, size_t k) { return inputs[inputs.size() == 1 ? 0 : k]; }

// The logits of all gates, [B, sum of their sizes]. Biases are undefined where there is none.
inline at::Tensor gate_logits(at::TensorList inputs, const std::vector<at::Tensor>& weights,
                              const std::vector<at::Tensor>& biases) {
  const auto there = [](const at::Tensor& bias) { return bias.defined(); };
  const bool all = std::all_of(biases.begin(), biases.end(), there);
  const bool none = std::none_of(biases.begin(), biases.end(), there);
  if (inputs.size() == 1 && (all || none)) {  // one product
    return at::linear(inputs[0], at::cat(weights), all ? std::optional<at::Tensor>(at::cat(biases)) : std::nullopt);
  }
  std::vector<at::Tensor> logits;
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto bias = biases[k].defined() ? std::optional<at::Tensor>(biases[k]) : std::nullopt;
    logits.push_back(at::linear(read_by_gate(inputs, k), weights[k], bias));
  }
  return at::cat(logits, 1);
}

struct GateGradients {
  std::vector<at::Tensor> weights, biases;
};

// From the logits' gradients, one a gate; adds to those of the inputs, of which there may be none.
inline GateGradients gate_gradients(at::TensorList inputs, at::TensorList weights,
                                    const std::vector<at::Tensor>& grad_logits,
                                    const std::vector<at::Tensor>& grad_inputs, bool need_weights, bool need_biases) {
  GateGradients result;
  if (inputs.size() == 1 && weights.size() > 1) {  // one product again
    const at::Tensor grad = at::cat(grad_logits, 1);
    if (!grad_inputs.empty()) grad_inputs[0].addmm_(grad, at::cat(weights));
    if (need_weights) {
      int64_t row = 0;
      const at::Tensor found = at::mm(grad.t(), inputs[0]);
      for (const at::Tensor& weight : weights) {
        result.weights.push_back(found.narrow(0, row, weight.size(0)).clone());
        row += weight.size(0);
      }
    }
  } else {
    for (size_t k = 0; k < weights.size(); ++k) {
      const size_t at = inputs.size() == 1 ? 0 : k;
      if (!grad_inputs.empty()) grad_inputs[at].addmm_(grad_logits[k], weights[k]);
      if (need_weights) result.weights.push_back(at::mm(grad_logits[k].t(), inputs[at]));
    }
  }
  for (size_t k = 0; need_biases && k < weights.size(); ++k) result.biases.push_back(grad_logits[k].sum(0));
  return result;
}

}  // namespace mtlk
