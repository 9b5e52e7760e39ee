// The operator expert_mixture without the dispatcher, for serving: a call of a few rows takes less time than its way
// through the dispatcher.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "level/folded_norms.h"

namespace mtlk {

struct ServeArgs {
  std::vector<at::Tensor> inputs, weights, biases;  // biases are undefined where there is none
  std::vector<at::Tensor> gate_logits;              // or the layers that make them
  std::vector<at::Tensor> gate_weights, gate_biases;
  std::vector<NormTensors> norms, gate_norms;  // batch norms by running statistics; empty without any
  std::vector<at::Tensor> slopes;              // of the activations, by layer and expert; empty without any
  std::vector<double> dice_eps;
  std::vector<int64_t> expert_inputs, gate_experts, gate_sizes, activations;
};

// The operator's outputs. Checks what it is given as the operator does; records no gradient.
std::vector<at::Tensor> serve_expert_mixture(const ServeArgs& args);

// The same for a level with slopes, which is the operator normalized_mixture's.
std::vector<at::Tensor> serve_with_slopes(const ServeArgs& args);

}  // namespace mtlk
