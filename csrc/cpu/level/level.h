// The operators of a level without the dispatcher, for the direct way from Python: a call of a few rows takes less time
// than its way through the dispatcher.
#pragma once

#include <optional>

#include "level/folded_norms.h"
#include "level/spec.h"

namespace mtlk {

// The operator level_forward, with batch norms by running statistics behind its products, saving nothing.
Tensors serve_level(const LevelSpec& spec, const LevelTensors& tensors, const RunningNorms& norms);

// Checks all that the operator would, for a call without norms.
void check_level(const LevelSpec& spec, const LevelTensors& tensors);

}  // namespace mtlk
