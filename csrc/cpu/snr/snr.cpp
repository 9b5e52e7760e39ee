#include "snr/snr.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>

#include <iterator>
#include <tuple>
#include <utility>

#include "snr/snr_call.h"

namespace mtlk {

std::vector<at::Tensor> evaluate_routes(const SnrTensors& tensors) {
  RECORD_FUNCTION(tensors.transforms ? "mtlkernels::snr_trans_forward" : "mtlkernels::snr_aver_forward", {});
  const at::AutoDispatchBelowADInplaceOrView below;
  return tensors.transforms ? snr_trans_forward(tensors.inputs, tensors.weights, tensors.z)
                            : snr_aver_forward(tensors.inputs, tensors.z);
}

std::vector<at::Tensor> differentiate_routes(const SnrTensors& tensors, at::TensorList grad_outputs,
                                             std::array<bool, 3> needs, bool closed_grad) {
  RECORD_FUNCTION(tensors.transforms ? "mtlkernels::snr_trans_backward" : "mtlkernels::snr_aver_backward", {});
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto [of_inputs, of_weights, of_z] = needs;
  std::vector<at::Tensor> found, weights, z;
  if (tensors.transforms) {
    std::tie(found, weights, z) = snr_trans_backward(grad_outputs, tensors.inputs, tensors.weights, tensors.z,
                                                     of_inputs, of_weights, of_z, closed_grad);
  } else {
    std::tie(found, z) = snr_aver_backward(grad_outputs, tensors.inputs, tensors.z, of_inputs, of_z, closed_grad);
  }
  found.resize(tensors.inputs.size());
  std::move(weights.begin(), weights.end(), std::back_inserter(found));
  found.resize(tensors.inputs.size() + tensors.weights.size());
  found.push_back(of_z ? z[0] : at::Tensor());
  return found;
}

}  // namespace mtlk
