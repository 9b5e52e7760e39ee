// Gates that are linear layers of the inputs: gate k reads the stream of number streams[k].
#pragma once

#include <vector>

#include "level/level_kernels.h"
#include "level/spec.h"

namespace mtlk {

// The gradients of weights and biases, of those that there are, from the logits' gradients, one a gate; adds to those
// of the inputs, of which there may be none.
struct GateGradients {
  Tensors weights, biases;
};
GateGradients gate_gradients(const LevelTensors& level, const std::vector<int>& streams, const Tensors& grad_logits,
                             const Tensors& grad_inputs, bool need_weights, bool need_biases,
                             const GateKernels& kernels);

}  // namespace mtlk
