// What the backward passes of several losses through one chain have in common.
#pragma once

#include <optional>
#include <vector>

#include "gemm/weight_forms.h"
#include "level/level_kernels.h"
#include "level/level_tables.h"

namespace mtlk {

// Of a level, or of the part of one that the losses reach together: weights in the forms that the kernels want.
class LossesInCommon {
 public:
  LossesInCommon(const LevelTensors& tensors, const LevelShape& level, const ChainKernels& kernels, bool need_experts);

  struct Pointers {
    std::vector<const void*> weights, last_weights;
    std::vector<int64_t> weight_ld, last_weight_ld;
  };

  // Points a loss's pass to them; what is returned must outlive it.
  Pointers point(ChainBackwardArgs& args) const;

 private:
  const int experts_;
  std::vector<int> place_;  // of an expert in this level, by its number in the whole
  std::optional<WeightForms> weights_, last_weights_;
};

}  // namespace mtlk
