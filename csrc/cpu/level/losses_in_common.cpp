#include "level/losses_in_common.h"

#include <algorithm>

namespace mtlk {

LossesInCommon::LossesInCommon(const LevelTensors& tensors, const LevelShape& level, const ChainKernels& kernels,
                               bool need_experts)
    : experts_(level.experts) {
  place_.assign(*std::max_element(level.numbers, level.numbers + experts_) + 1, -1);
  for (int e = 0; e < experts_; ++e) place_[level.numbers[e]] = e;
  const at::TensorList weights(tensors.weights);
  if (need_experts) weights_.emplace().set(weights, kernels.engine, kernels.engine.backward_transposed);
  if (computes_last_again(level)) {
    last_weights_.emplace().set(weights.slice(weights.size() - experts_), kernels.engine, false);
  }
}

LossesInCommon::Pointers LossesInCommon::point(ChainBackwardArgs& args) const {
  Pointers own;
  LevelShape& level = args.level;
  for (int l = 0; weights_ && l < level.layers; ++l) {
    for (int e = 0; e < level.experts; ++e) {
      const int at = l * experts_ + place_[level.numbers[e]];
      own.weights.push_back(weights_->pointers()[at]);
      own.weight_ld.push_back(weights_->ld()[at]);
    }
  }
  for (int e = 0; last_weights_ && e < level.experts; ++e) {
    const int at = place_[level.numbers[e]];
    own.last_weights.push_back(last_weights_->pointers()[at]);
    own.last_weight_ld.push_back(last_weights_->ld()[at]);
  }
  level.weights = own.weights.data();
  level.weight_ld = own.weight_ld.data();
  args.last_weights = own.last_weights.data();
  args.last_weight_ld = own.last_weight_ld.data();
  return own;
}

}  // namespace mtlk
