// The operators of a level on CPUs.

#include "level/level.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <memory>

#include "gemm/kept_weights.h"
#include "gemm/weight_forms.h"
#include "level/chain.h"
#include "level/layerwise.h"
#include "level/losses_in_common.h"
#include "runtime/check.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

LevelResults evaluate(const LevelSpec& spec, const LevelTensors& tensors, const RunningNorms& norms,
                      const std::optional<at::Tensor>& seed, bool save) {
  LevelTables tables(spec, tensors);
  const Dtype dtype = dtype_of(tensors.inputs[0]);
  const int64_t rows = tables.level().rows, width = tables.product_width();
  if (spec.stores_inputs()) {
    const auto& kernels = kernels_for<LayerwiseKernels>(dtype, rows, width, &Pays::forward);
    tables.set_norms(norms.experts, kernels.fold_norm);
    return layerwise_forward(spec, tensors, tables, kernels, norms, seed, save);
  }
  const auto& kernels = kernels_for<ChainKernels>(dtype, rows, width, &Pays::forward);
  tables.set_norms(norms.experts, kernels.fold_norm);
  return chain_forward(tensors, tables, kernels, norms, spec.saved_shape(dtype), save);
}

Tensors level_forward(at::TensorList inputs, const OptionalTensors& parameters, const OptionalTensors& gates,
                      at::IntArrayRef ints, at::ArrayRef<double> floats, const std::optional<at::Tensor>& seed,
                      bool save) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const LevelSpec spec(ints.vec(), floats.vec());
  auto [results, saved] = evaluate(spec, spec.split(inputs, parameters, gates), {}, seed, save);
  std::move(saved.begin(), saved.end(), std::back_inserter(results));
  return results;
}

// What level_serve gets in the place of norms, by layer and expert and for each linear gate; `kept` holds it.
RunningNorms folded_norms(const LevelSpec& spec, const LevelTensors& tensors, const OptionalTensors& scales,
                          const OptionalTensors& shifts, Tensors& kept) {
  const int64_t layers = spec.layers(), count = layers + static_cast<int64_t>(spec.gate_inputs.size());
  const bool wide = tensors.inputs[0].scalar_type() == at::kDouble;
  const auto place = [&](const OptionalTensors& list, int64_t i, const char* name, at::IntArrayRef sizes) {
    const at::Tensor tensor = resolved(list.get(i).value_or(at::Tensor()));
    if (!tensor.defined()) return static_cast<const char*>(nullptr);
    check_dense(name, i, tensor, wide ? at::kDouble : at::kFloat);
    MTLK_CHECK_VALUE(tensor.sizes() == sizes, name, "[", i, "] must have shape ", sizes, ", got ", tensor.sizes());
    kept.push_back(tensor.contiguous());
    return static_cast<const char*>(kept.back().const_data_ptr());
  };
  for (const OptionalTensors* list : {&scales, &shifts}) {
    MTLK_CHECK_VALUE(static_cast<int64_t>(list->size()) == count, list == &scales ? "scales" : "shifts",
                     " must hold an entry for each of ", layers, " layers and ", count - layers, " linear gates, got ",
                     list->size());
  }
  RunningNorms found;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t experts = i < layers ? spec.experts() : 1;
    const at::Tensor like = i < layers ? tensors.weights[i * experts] : at::Tensor();
    const int64_t width = i >= layers                         ? spec.gate_sizes[i - layers]
                          : like.defined() && like.dim() == 2 ? like.size(0)
                                                              : 0;
    const std::vector<int64_t> sizes = i < layers ? std::vector{experts, width} : std::vector{width};
    const char *scale = place(scales, i, "scales", sizes), *shift = place(shifts, i, "shifts", sizes);
    MTLK_CHECK_VALUE(!scale == !shift, "scales[", i, "] and shifts[", i, "] must both be there, or none of them");
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t at = e * width * static_cast<int64_t>(wide ? sizeof(double) : sizeof(float));
      NormTensors norm;
      if (scale) norm.scale = scale + at, norm.shift = shift + at;
      (i < layers ? found.experts : found.gates).push_back(std::move(norm));
    }
  }
  return found;
}

Tensors level_serve(at::TensorList inputs, const OptionalTensors& parameters, const OptionalTensors& gates,
                    const OptionalTensors& scales, const OptionalTensors& shifts, at::IntArrayRef ints,
                    at::ArrayRef<double> floats) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const LevelSpec spec(ints.vec(), floats.vec());
  const LevelTensors tensors = spec.split(inputs, parameters, gates);
  Tensors kept;
  return evaluate(spec, tensors, folded_norms(spec, tensors, scales, shifts, kept), {}, false).outputs;
}

// What the forward pass saved.
struct Saved {
  at::TensorList activations, statistics;
  SavedShape shape;
};

// Of a level, all of whose outputs have a gradient; or of the part of another one that was reached.
Tensors gradients_of(const LevelSpec& spec, const LevelTensors& tensors, const Tensors& logits,
                     at::TensorList grad_outputs, const Saved& saved, const std::optional<at::Tensor>& seed,
                     const Needs& needs, const LossesInCommon* shared) {
  LevelTables tables(spec, tensors);
  if (tensors.linear_gates) tables.check_gate_layers();
  tables.set_logits(logits);
  tables.set_grad_outputs(grad_outputs);
  tables.set_saved(saved.activations, saved.shape);
  const LevelShape& level = tables.level();
  const Dtype dtype = dtype_of(tensors.inputs[0]);
  const int64_t width = tables.product_width();
  if (!spec.stores_inputs()) {
    const auto& kernels = kernels_for<ChainKernels>(dtype, level.rows, width, &Pays::backward);
    LevelGradients gradients(level, tensors, kernels.engine, needs);
    chain_backward(tensors, tables, kernels, gradients, shared);
    return gradients.take(tables.gate_streams(), kernels.gates);
  }
  const auto& kernels = kernels_for<LayerwiseKernels>(dtype, level.rows, width, &Pays::layerwise_backward);
  LevelGradients gradients(level, tensors, kernels.engine, needs);
  layerwise_backward(spec, tensors, tables, kernels, saved.statistics, saved.shape.experts, seed, gradients);
  return gradients.take({}, {});
}

// Whether every stream and every expert is part of what all gates together mix.
bool all_read(const LevelSpec& spec) {
  const auto holds = [](at::IntArrayRef values, int64_t value) {
    return std::find(values.begin(), values.end(), value) != values.end();
  };
  for (int64_t e = 0; e < spec.experts(); ++e) {
    if (!holds(spec.gate_experts, e)) return false;
  }
  for (int64_t stream = 0; stream < spec.num_inputs; ++stream) {
    if (!holds(spec.expert_inputs, stream) && !holds(spec.gate_inputs, stream)) return false;
  }
  return true;
}

// What the backward passes of several losses, each of which reaches a part of the level, share; null for nothing.
std::unique_ptr<LossesInCommon> in_common(const LevelSpec& spec, const LevelTensors& tensors,
                                          const std::vector<ReachedLevel>& parts, const Needs& needs) {
  const at::Tensor& x = tensors.inputs[0];
  if (parts.size() < 2 || spec.stores_inputs() || x.size(0) == 0) return nullptr;
  const bool need_experts = std::any_of(needs.begin(), needs.begin() + 6, [](bool need) { return need; });
  std::vector<bool> reached(spec.gates());
  for (const ReachedLevel& part : parts) {
    for (const int64_t k : part.gates) reached[k] = true;
  }
  const ReachedLevel all = spec.reached(reached);
  const LevelTensors own = all.pick(tensors);
  const LevelTables tables(all.spec, own);
  const int64_t width = tables.product_width();
  const auto& kernels = kernels_for<ChainKernels>(dtype_of(x), x.size(0), width, &Pays::backward);
  return std::make_unique<LossesInCommon>(own, tables.level(), kernels, need_experts);
}

// Of one loss after another.
Tensors gradients_of_losses(const LevelSpec& spec, const LevelTensors& tensors, const Tensors& grad_outputs,
                            at::TensorList saved, const std::optional<at::Tensor>& seed, const Needs& needs) {
  const auto count = static_cast<int64_t>(grad_outputs.size());
  MTLK_CHECK_VALUE(count > 0 && count % spec.gates() == 0, "grad_outputs must hold an entry for each of ", spec.gates(),
                   " gates, or as many for each of several losses, got ", count);
  const auto linear = static_cast<size_t>(tensors.linear_gates);
  const SavedShape shape = spec.saved_shape(dtype_of(tensors.inputs[0]));
  const auto activations = static_cast<size_t>(shape.tensors());
  const size_t statistics = 2 * std::count_if(spec.norms.begin(), spec.norms.end(), [](int64_t norm) { return norm; });
  MTLK_CHECK_VALUE(saved.size() == activations + statistics + linear, "saved must hold ",
                   activations + statistics + linear, " tensors, got ", saved.size());
  Tensors logits = tensors.gates;
  if (linear) {
    check_dense("saved", saved.size() - 1, saved.back(), tensors.inputs[0].scalar_type());
    MTLK_CHECK_VALUE(saved.back().dim() == 2 && saved.back().size(1) == static_cast<int64_t>(spec.gate_experts.size()),
                     "the saved logits must have ", spec.gate_experts.size(), " columns, got ", saved.back().sizes());
    logits = saved.back().split_with_sizes(spec.gate_sizes, 1);
  }
  std::vector<Tensors> grads;
  std::vector<std::vector<bool>> losses;  // whether each output has a gradient; of losses that reach any
  for (int64_t first = 0; first < count; first += spec.gates()) {
    Tensors present;
    std::vector<bool> outputs;
    for (int64_t k = first; k < first + spec.gates(); ++k) {
      outputs.push_back(grad_outputs[k].defined());
      if (grad_outputs[k].defined()) present.push_back(grad_outputs[k]);
    }
    if (present.empty()) continue;
    grads.push_back(std::move(present));
    losses.push_back(std::move(outputs));
  }
  const Saved kept{saved.slice(0, activations), saved.slice(activations, statistics), shape};
  if (losses.size() == 1 && static_cast<int64_t>(grads[0].size()) == spec.gates() && all_read(spec)) {
    return gradients_of(spec, tensors, logits, grads[0], kept, seed, needs, nullptr);
  }
  std::vector<ReachedLevel> parts;
  for (const std::vector<bool>& outputs : losses) parts.push_back(spec.reached(outputs));
  const auto shared = in_common(spec, tensors, parts, needs);
  Tensors result;
  for (size_t i = 0; i < parts.size(); ++i) {
    Tensors found = gradients_of(parts[i].spec, parts[i].pick(tensors), picked(logits, parts[i].gates), grads[i], kept,
                                 seed, needs, shared.get());
    std::move(found.begin(), found.end(), std::back_inserter(result));
  }
  return result;
}

Tensors level_backward(const OptionalTensors& grad_outputs, at::TensorList inputs, const OptionalTensors& parameters,
                       const OptionalTensors& gates, at::TensorList saved, at::IntArrayRef ints,
                       at::ArrayRef<double> floats, const std::optional<at::Tensor>& seed, Needs needs) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const LevelSpec spec(ints.vec(), floats.vec());
  Tensors grads;
  for (size_t i = 0; i < grad_outputs.size(); ++i)
    grads.push_back(resolved(grad_outputs.get(i).value_or(at::Tensor())));
  return gradients_of_losses(spec, spec.split(inputs, parameters, gates), grads, saved, seed, needs);
}

}  // namespace

Tensors serve_level(const LevelSpec& spec, const LevelTensors& tensors, const RunningNorms& norms) {
  RECORD_FUNCTION("mtlkernels::level_serve", {});
  return evaluate(spec, tensors, norms, std::nullopt, false).outputs;
}

LevelResults train_level(const LevelSpec& spec, const LevelTensors& tensors, const at::Tensor& seed, bool save) {
  RECORD_FUNCTION("mtlkernels::level_forward", {});
  const at::AutoDispatchBelowADInplaceOrView below;
  return evaluate(spec, tensors, {}, seed, save);
}

Tensors differentiate_level(const LevelSpec& spec, const LevelTensors& tensors, const Tensors& grad_outputs,
                            at::TensorList saved, const at::Tensor& seed, const Needs& needs) {
  RECORD_FUNCTION("mtlkernels::level_backward", {});
  const at::AutoDispatchBelowADInplaceOrView below;
  Tensors found = gradients_of_losses(spec, tensors, grad_outputs, saved, seed, needs);
  std::vector<bool> outputs;
  for (const at::Tensor& grad : grad_outputs) outputs.push_back(grad.defined());
  const ReachedLevel part = spec.reached(outputs);
  Tensors result;
  auto next = found.begin();
  // `numbers` are of the part's among `count` of a kind in each of the blocks, as layers are.
  const auto place = [&](size_t kind, const Tensors& all, const std::vector<int64_t>& numbers, int64_t count) {
    const auto first = static_cast<int64_t>(result.size());
    result.resize(first + all.size());
    for (int64_t block = 0; needs[kind] && block < static_cast<int64_t>(all.size()); block += count) {
      for (const int64_t number : numbers) {
        if (all[block + number].defined()) result[first + block + number] = std::move(*next++);
      }
    }
  };
  place(0, tensors.inputs, part.inputs, spec.num_inputs);
  place(1, tensors.weights, part.experts, spec.experts());
  place(2, tensors.biases, part.experts, spec.experts());
  place(3, tensors.scales, part.experts, spec.experts());
  place(4, tensors.shifts, part.experts, spec.experts());
  place(5, tensors.slopes, part.experts, spec.experts());
  place(6, tensors.gates, part.gates, spec.gates());
  place(7, tensors.gate_biases, part.gates, spec.gates());
  return result;
}

void declare_weight(const at::Tensor& weight) {
  const Dtype dtype = dtype_of(weight);
  if (keeps_prepared(kernels_for<KernelsByRows<ChainKernels>>(dtype).usual.engine) ||
      keeps_prepared(kernels_for<KernelsByRows<LayerwiseKernels>>(dtype).usual.engine)) {
    KeptWeights::instance().declare(weight);
  }
}

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("level_forward", TORCH_FN(level_forward));
  m.impl("level_backward", TORCH_FN(level_backward));
  m.impl("level_serve", TORCH_FN(level_serve));
}

}  // namespace mtlk
