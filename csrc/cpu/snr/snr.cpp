#include "snr/snr.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "snr/snr_call.h"

namespace mtlk {
namespace {

// Of a call whose outputs all have a gradient.
std::vector<at::Tensor> differentiate_all(const SnrTensors& tensors, at::TensorList grad_outputs,
                                          std::array<bool, 3> needs, bool closed_grad) {
  const auto [of_inputs, of_weights, of_z] = needs;
  const std::vector<at::Tensor> found =
      tensors.transforms ? snr_trans_backward(grad_outputs, tensors.inputs, tensors.weights, tensors.z, of_inputs,
                                              of_weights, of_z, closed_grad)
                         : snr_aver_backward(grad_outputs, tensors.inputs, tensors.z, of_inputs, of_z, closed_grad);
  std::vector<at::Tensor> result;
  auto next = found.begin();
  const auto place = [&](bool wanted, size_t count) {
    for (size_t i = 0; i < count; ++i) result.push_back(wanted ? *next++ : at::Tensor());
  };
  place(of_inputs, tensors.inputs.size());
  place(of_weights, tensors.weights.size());
  place(of_z, 1);
  return result;
}

bool is_stacked(const SnrTensors& tensors) { return tensors.weights.size() == 1; }  // of two outputs or more

// A view where they follow each other: weights may be large.
at::Tensor rows_of(const at::Tensor& tensor, at::IntArrayRef rows) {
  const auto count = static_cast<int64_t>(rows.size());
  if (rows.back() - rows.front() + 1 == count) return tensor.narrow(0, rows.front(), count);
  std::vector<at::Tensor> found;
  for (const int64_t row : rows) found.push_back(tensor.select(0, row));
  return at::stack(found);
}

// Rows in their places among `count`; the others are zeros.
at::Tensor placed(const at::Tensor& found, at::IntArrayRef rows, int64_t count) {
  std::vector<int64_t> sizes = found.sizes().vec();
  sizes[0] = count;
  const at::Tensor whole = at::zeros(sizes, found.options());
  for (int64_t n = 0; n < found.size(0); ++n) whole.select(0, rows[n]).copy_(found.select(0, n));
  return whole;
}

// The call of these outputs alone.
SnrTensors of_outputs(const SnrTensors& tensors, at::IntArrayRef used) {
  SnrTensors part{tensors.inputs, {}, rows_of(tensors.z, used), tensors.transforms};
  if (is_stacked(tensors)) {
    part.weights.push_back(rows_of(tensors.weights[0], used));
  } else if (tensors.transforms) {
    const auto inputs = static_cast<int64_t>(tensors.inputs.size());
    for (const int64_t i : used) {
      const auto first = tensors.weights.begin() + i * inputs;
      part.weights.insert(part.weights.end(), first, first + inputs);
    }
  }
  return part;
}

// From such a call's gradients to those of the whole: undefined for matrices, and zeros for rows, of other outputs.
std::vector<at::Tensor> into_whole(const SnrTensors& tensors, const std::vector<at::Tensor>& found,
                                   at::IntArrayRef used, int64_t outputs, std::array<bool, 3> needs) {
  const auto inputs = static_cast<int64_t>(tensors.inputs.size());
  std::vector<at::Tensor> whole(found.begin(), found.begin() + inputs);
  whole.resize(inputs + tensors.weights.size());
  if (needs[1] && is_stacked(tensors)) {
    whole[inputs] = placed(found[inputs], used, outputs);
  } else if (needs[1]) {
    for (size_t n = 0; n < used.size(); ++n) {
      const auto first = found.begin() + inputs * static_cast<int64_t>(n + 1);
      std::copy(first, first + inputs, whole.begin() + inputs * (used[n] + 1));
    }
  }
  whole.push_back(needs[2] ? placed(found.back(), used, outputs) : at::Tensor());
  return whole;
}

}  // namespace

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
  std::vector<int64_t> used;
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    if (!grad_outputs[i].defined()) continue;
    used.push_back(static_cast<int64_t>(i));
    grads.push_back(grad_outputs[i]);
  }
  if (used.size() == grad_outputs.size()) return differentiate_all(tensors, grads, needs, closed_grad);
  const std::vector<at::Tensor> found = differentiate_all(of_outputs(tensors, used), grads, needs, closed_grad);
  return into_whole(tensors, found, used, static_cast<int64_t>(grad_outputs.size()), needs);
}

}  // namespace mtlk
