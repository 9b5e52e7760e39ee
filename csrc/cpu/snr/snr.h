// SNR's operators without the dispatcher, for the direct way from Python: training a few rows takes less time than its
// way through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "runtime/api.h"

namespace mtlk {

// What a call is of: weights as the operators take them, none for Aver.
struct SnrTensors {
  std::vector<at::Tensor> inputs, weights;
  at::Tensor z;
  bool transforms;  // Trans, otherwise Aver
};

// The operators snr_trans_forward and snr_aver_forward.
MTLK_API std::vector<at::Tensor> evaluate_routes(const SnrTensors& tensors);

// The operators snr_trans_backward and snr_aver_backward: a gradient in the place of each of the inputs, the weights
// and z, undefined where `needs`, a flag for each of the three kinds, wants none. An output may have an undefined
// gradient, but not all of them; matrices of its own then have none either.
MTLK_API std::vector<at::Tensor> differentiate_routes(const SnrTensors& tensors, at::TensorList grad_outputs,
                                                      std::array<bool, 3> needs, bool closed_grad);

}  // namespace mtlk
