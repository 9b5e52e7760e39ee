// The operators of a level without the dispatcher, for the direct way from Python: a call of a few rows takes less time
// than its way through the dispatcher.
#pragma once

#include <optional>

#include "level/chain.h"
#include "level/folded_norms.h"
#include "level/spec.h"
#include "runtime/api.h"

namespace mtlk {

// The operator level_forward, with batch norms by running statistics behind its products, saving nothing.
MTLK_API Tensors serve_level(const LevelSpec& spec, const LevelTensors& tensors, const RunningNorms& norms);

// The operator level_forward. An undefined `seed` is None.
MTLK_API LevelResults train_level(const LevelSpec& spec, const LevelTensors& tensors, const at::Tensor& seed,
                                  bool save);

// The operator level_backward of one loss, for what `train_level` has saved: a gradient in the place of each tensor, in
// the order in which they travel, undefined where none is needed or reaches it. Undefined `grad_outputs` are None.
MTLK_API Tensors differentiate_level(const LevelSpec& spec, const LevelTensors& tensors, const Tensors& grad_outputs,
                                     at::TensorList saved, const at::Tensor& seed, const Needs& needs);

// Says that nobody writes to a weight of levels any more; see KeptWeights. Of no effect where kernels of its dtype keep
// nothing.
MTLK_API void declare_weight(const at::Tensor& weight);

}  // namespace mtlk
