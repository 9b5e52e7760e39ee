// A level with norms by the batch, dropout or slopes: a layer of all rows after another, with their pre-activations
// stored.
#pragma once

#include <optional>

#include "level/chain.h"

namespace mtlk {

// Saved are statistics, and with `save` the pre-activations before them.
LevelResults layerwise_forward(const LevelSpec& spec, const LevelTensors& tensors, LevelTables& tables,
                               const LayerwiseKernels& kernels, const RunningNorms& norms,
                               const std::optional<at::Tensor>& seed, bool save);

// Fills the gradients, from the statistics of a whole level of so many experts. The tables have the outputs' gradients
// and the pre-activations.
void layerwise_backward(const LevelSpec& spec, const LevelTensors& tensors, LevelTables& tables,
                        const LayerwiseKernels& kernels, at::TensorList statistics, int64_t experts,
                        const std::optional<at::Tensor>& seed, LevelGradients& gradients);

}  // namespace mtlk
