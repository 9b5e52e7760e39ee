// What the backward passes of several losses through one chain have in common.
#pragma once

#include <optional>
#include <vector>

#include "gemm/weight_forms.h"
#include "level/level_kernels.h"
#include "level/level_tables.h"

namespace mtlk {

// Of a level, or of the part of one that the losses reach together: weights in the forms that the kernels want; and
// where the forward pass has not saved what the last layer gave, that of the experts of which several losses want it.
class LossesInCommon {
 public:
  // The tables have what the forward pass saved; `several` are the experts, by their number in this level.
  LossesInCommon(const LevelTensors& tensors, const LevelTables& tables, const ChainKernels& kernels, bool need_experts,
                 const std::vector<int>& several);

  struct Pointers {
    std::vector<const void*> weights, last_weights, last_values;
    std::vector<int64_t> weight_ld, last_weight_ld;
  };

  // Points a loss's pass to them; what is returned must outlive it.
  Pointers point(ChainBackwardArgs& args) const;

 private:
  void compute(const LevelTables& tables, const ChainKernels& kernels, const std::vector<int>& several);

  const int experts_;
  const int64_t value_size_;
  std::vector<int> place_;  // of an expert in this level, by its number in the whole
  std::optional<WeightForms> weights_, last_weights_;
  std::optional<Scratch> memory_;
  std::vector<const void*> last_values_;
};

}  // namespace mtlk
