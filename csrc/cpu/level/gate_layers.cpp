#include "level/gate_layers.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace mtlk {
namespace {

bool alike(const std::vector<int>& streams) {
  return std::all_of(streams.begin(), streams.end(), [&](int stream) { return stream == streams[0]; });
}

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

at::Tensor gate_logits(const Tensors& inputs, const std::vector<int>& streams, const Tensors& weights,
                       const Tensors& biases) {
  const auto there = std::count_if(biases.begin(), biases.end(), [](const at::Tensor& bias) { return bias.defined(); });
  const bool all = there == static_cast<int64_t>(biases.size());
  if (alike(streams) && (all || there == 0)) {  // one product
    return at::linear(inputs[streams[0]], at::cat(weights), all ? optional(at::cat(biases)) : std::nullopt);
  }
  Tensors logits;
  for (size_t k = 0; k < weights.size(); ++k) {
    logits.push_back(at::linear(inputs[streams[k]], weights[k], optional(biases[k])));
  }
  return at::cat(logits, 1);
}

GateGradients gate_gradients(const LevelTensors& level, const std::vector<int>& streams, const Tensors& grad_logits,
                             const Tensors& grad_inputs, bool need_weights, bool need_biases) {
  const Tensors& weights = level.gates;
  GateGradients result;
  if (alike(streams) && weights.size() > 1) {  // one product again
    const at::Tensor grad = at::cat(grad_logits, 1);
    if (!grad_inputs.empty()) grad_inputs[streams[0]].addmm_(grad, at::cat(weights));
    if (need_weights) {
      int64_t row = 0;
      const at::Tensor found = at::mm(grad.t(), level.inputs[streams[0]]);
      for (const at::Tensor& weight : weights) {
        result.weights.push_back(found.narrow(0, row, weight.size(0)).clone());
        row += weight.size(0);
      }
    }
  } else {
    for (size_t k = 0; k < weights.size(); ++k) {
      if (!grad_inputs.empty()) grad_inputs[streams[k]].addmm_(grad_logits[k], weights[k]);
      if (need_weights) result.weights.push_back(at::mm(grad_logits[k].t(), level.inputs[streams[k]]));
    }
  }
  for (size_t k = 0; need_biases && k < weights.size(); ++k) {
    result.biases.push_back(level.gate_biases[k].defined() ? grad_logits[k].sum(0) : at::Tensor());
  }
  return result;
}

}  // namespace mtlk
