// A level whose layers need no more than what a block of rows makes of them: all layers of a block, one after another.
#pragma once

#include "level/level_gradients.h"
#include "level/level_kernels.h"
#include "level/level_tables.h"

namespace mtlk {

struct LevelResults {
  Tensors outputs, saved;
};

// With `save`, what the backward pass wants is saved, in that shape.
LevelResults chain_forward(const LevelTensors& tensors, LevelTables& tables, const ChainKernels& kernels,
                           const RunningNorms& norms, const SavedShape& shape, bool save);

// The outputs alone, of a level whose tables are complete.
Tensors serve_chain(const LevelShape& level, const at::TensorOptions& options, const ChainKernels& kernels);

class LossesInCommon;

// Fills the gradients. The tables have the outputs' gradients and what the forward pass saved. `shared`: what this loss
// shares with others, or null.
void chain_backward(const LevelTensors& tensors, LevelTables& tables, const ChainKernels& kernels,
                    LevelGradients& gradients, const LossesInCommon* shared);

}  // namespace mtlk
