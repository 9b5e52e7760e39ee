#include "level/level_gradients.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "level/blocking.h"
#include "level/gate_layers.h"
#include "runtime/caches.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"

namespace mtlk {
bool LevelGradients::Results::any() const {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.defined(); });
}

LevelGradients::LevelGradients(const LevelShape& level, const LevelTensors& tensors, const EngineTable& engine,
                               const Needs& needs)
    : level_(tensors),
      needs_(needs),
      compute_(tensors.weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
      experts_(level.experts),
      layers_(level.layers) {
  const auto [need_inputs, need_weights, need_biases, need_scales, need_shifts, need_slopes, need_gates, need_offsets] =
      needs;
  const int64_t *const first = level.expert_inputs, *const last = first + level.experts;
  for (size_t i = 0; need_inputs && i < tensors.inputs.size(); ++i) {
    const at::Tensor& x = tensors.inputs[i];
    const bool read = std::find(first, last, static_cast<int64_t>(i)) != last;
    inputs_.add(read ? pooled(x.sizes(), x.options(), true) : at::zeros(x.sizes(), x.options()));
  }
  if (need_gates || (tensors.linear_gates && (need_inputs || need_offsets))) {
    for (int k = 0; k < level.gates.count; ++k) {
      const at::Tensor& like = tensors.linear_gates ? tensors.inputs[0] : tensors.gates[k];
      logits_.add(at::empty({level.rows, level.gates.sizes[k]}, like.options()));
    }
  }
  for (int l = 0; l < level.layers; ++l) {
    sum_ld_.push_back(divide_up(level.widths[l], engine.weight_sum_multiple) * engine.weight_sum_multiple);
  }
  const bool at_once = level.rows == 0 || level.rows <= chunk_rows(level, engine);
  for (size_t i = 0; i < tensors.weights.size(); ++i) {
    const at::Tensor &weight = tensors.weights[i], nothing;
    const int64_t out = weight.size(0), ld = sum_ld_[i / experts_];
    const auto compute = weight.options().dtype(compute_);
    if (need_weights) {
      weights_.add(pooled(weight.sizes(), weight.options()));
      const bool fits = engine.sums_as_stored && ld == weight.size(1);
      weight_sums_.add(fits ? weights_.tensors[i] : at_once ? nothing : pooled({out, ld}, compute, true));
    }
    const bool bias = need_biases && tensors.biases[i].defined();
    biases_.add(bias ? at::empty({out}, weight.options()) : nothing);
    bias_sums_.add(!bias || engine.sums_as_stored ? biases_.tensors[i] : at::empty({out}, compute));
    for (auto [results, parts, need] : {std::tuple{&scales_, &tensors.scales, need_scales},
                                        {&shifts_, &tensors.shifts, need_shifts},
                                        {&slopes_, &tensors.slopes, need_slopes}}) {
      if (parts->empty()) continue;
      results->add(need && (*parts)[i].defined() ? at::zeros({out}, compute) : nothing);
    }
  }
}

int64_t LevelGradients::weight_bytes() const {
  return std::accumulate(weights_.tensors.begin(), weights_.tensors.end(), int64_t{0},
                         [](int64_t sum, const at::Tensor& grad) { return sum + static_cast<int64_t>(grad.nbytes()); });
}

void LevelGradients::point(GradientArgs& args) const {
  args.grad_inputs = inputs_.data();
  args.grad_logits = logits_.data();
  args.need_weights = !weights_.tensors.empty();
  args.need_biases = biases_.any();
  args.weights_past_caches = weight_bytes() >= cached_bytes();
  args.need_experts =
      args.grad_inputs || args.need_weights || args.need_biases || scales_.any() || shifts_.any() || slopes_.any();
  args.grad_weights = weights_.data();
  args.grad_biases = biases_.data();
  args.weight_sums = weight_sums_.data();
  args.weight_sum_ld = sum_ld_.data();
  args.bias_sums = bias_sums_.data();
}

void LevelGradients::point(NormLayer* layers) const {
  for (int l = 0; l < layers_; ++l) {
    layers[l].grad_scales = scales_.data(l * experts_);
    layers[l].grad_shifts = shifts_.data(l * experts_);
    layers[l].grad_activation_slopes = slopes_.data(l * experts_);
  }
}

void LevelGradients::zero() {
  for (const Results* results : {&weights_, &biases_}) {
    for (const at::Tensor& grad : results->tensors) {
      if (grad.defined()) grad.zero_();
    }
  }
}

Tensors LevelGradients::take(const std::vector<int>& gate_streams, const GateKernels& kernels) {
  Tensors result;
  const auto add = [&](const Tensors& grads) {
    std::copy_if(grads.begin(), grads.end(), std::back_inserter(result),
                 [](const at::Tensor& grad) { return grad.defined(); });
  };
  GateGradients gates{logits_.tensors, {}};
  if (level_.linear_gates && !logits_.tensors.empty()) {
    gates = gate_gradients(level_, gate_streams, logits_.tensors, inputs_.tensors, needs_[6], needs_[7], kernels);
  }
  for (const Results* results : {&inputs_, &weights_, &biases_}) add(results->tensors);
  for (auto [results, parts] :
       {std::pair{&scales_, &level_.scales}, {&shifts_, &level_.shifts}, {&slopes_, &level_.slopes}}) {
    for (size_t i = 0; i < parts->size(); ++i) {
      const at::Tensor& grad = results->tensors[i];
      if (!grad.defined()) continue;
      const bool whole = grad.sizes() == (*parts)[i].sizes();  // otherwise one slope serves all channels
      result.push_back((whole ? grad : grad.sum().view(1)).to((*parts)[i].scalar_type()));
    }
  }
  add(gates.weights);
  add(gates.biases);
  return result;
}

}  // namespace mtlk
