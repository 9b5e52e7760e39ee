// The operators of a level on CPUs.

#include "level/level.h"

#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>

#include "level/chain.h"
#include "level/layerwise.h"
#include "runtime/check.h"

namespace mtlk {
namespace {

LevelResults evaluate(const LevelSpec& spec, const LevelTensors& tensors, const RunningNorms& norms,
                      const std::optional<at::Tensor>& seed, bool save) {
  LevelTables tables(spec, tensors);
  const Dtype dtype = dtype_of(tensors.inputs[0]);
  const int64_t rows = tables.level().rows;
  if (spec.stores_inputs()) {
    const auto& kernels = kernels_for<LayerwiseKernels>(dtype, rows);
    tables.set_norms(norms.experts, kernels.fold_norm);
    return layerwise_forward(spec, tensors, tables, kernels, norms, seed, save);
  }
  const auto& by_rows = kernels_for<KernelsByRows<ChainKernels>>(dtype);
  const ChainKernels& kernels = by_rows.of(rows, by_rows.usual.min_forward_rows);
  tables.set_norms(norms.experts, kernels.fold_norm);
  return chain_forward(tensors, tables, kernels, norms, save);
}

std::tuple<Tensors, Tensors> forward(at::TensorList inputs, const OptionalTensors& parameters,
                                     const OptionalTensors& gates, at::IntArrayRef ints, at::ArrayRef<double> floats,
                                     const std::optional<at::Tensor>& seed, bool save) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const LevelSpec spec(ints.vec(), floats.vec());
  LevelResults results = evaluate(spec, spec.split(inputs, parameters, gates), {}, seed, save);
  return {std::move(results.outputs), std::move(results.saved)};
}

// Of a level, all of whose outputs have a gradient; or of the part of another one that was reached.
Tensors gradients_of(const LevelSpec& spec, const LevelTensors& tensors, const Tensors& logits,
                     at::TensorList grad_outputs, at::TensorList activations, at::TensorList statistics,
                     int64_t experts, const std::optional<at::Tensor>& seed, const Needs& needs) {
  LevelTables tables(spec, tensors);
  if (tensors.linear_gates) tables.check_gate_layers();
  tables.set_logits(logits);
  tables.set_grad_outputs(grad_outputs);
  tables.set_saved(activations, static_cast<int64_t>(activations.size()), experts);
  const LevelShape& level = tables.level();
  const Dtype dtype = dtype_of(tensors.inputs[0]);
  if (!spec.stores_inputs()) {
    const auto& kernels = kernels_for<ChainKernels>(dtype, level.rows);
    LevelGradients gradients(level, tensors, kernels.engine, needs);
    chain_backward(tensors, tables, kernels, gradients);
    return gradients.take(tables.gate_streams());
  }
  const auto& kernels = kernels_for<LayerwiseKernels>(dtype, level.rows);
  LevelGradients gradients(level, tensors, kernels.engine, needs);
  layerwise_backward(spec, tensors, tables, kernels, statistics, experts, seed, gradients);
  return gradients.take(tables.gate_streams());
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

Tensors backward(const OptionalTensors& grad_outputs, at::TensorList inputs, const OptionalTensors& parameters,
                 const OptionalTensors& gates, at::TensorList saved, at::IntArrayRef ints, at::ArrayRef<double> floats,
                 const std::optional<at::Tensor>& seed, Needs needs) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const LevelSpec spec(ints.vec(), floats.vec());
  const LevelTensors tensors = spec.split(inputs, parameters, gates);
  MTLK_CHECK_VALUE(static_cast<int64_t>(grad_outputs.size()) == spec.gates(),
                   "grad_outputs must hold an entry for each of ", spec.gates(), " gates, got ", grad_outputs.size());
  Tensors grads;
  std::vector<bool> used;
  for (size_t k = 0; k < grad_outputs.size(); ++k) {
    const at::Tensor grad = grad_outputs.get(k).value_or(at::Tensor());
    used.push_back(grad.defined());
    if (grad.defined()) grads.push_back(grad);
  }
  if (grads.empty()) return {};
  const auto layers = static_cast<size_t>(spec.layers()), linear = static_cast<size_t>(tensors.linear_gates);
  const size_t activations = spec.stores_inputs() ? layers : saved_layers(static_cast<int>(layers));
  const size_t statistics = 2 * std::count_if(spec.norms.begin(), spec.norms.end(), [](int64_t norm) { return norm; });
  MTLK_CHECK_VALUE(saved.size() == activations + statistics + linear, "saved must hold ",
                   activations + statistics + linear, " tensors, got ", saved.size());
  Tensors logits = tensors.gates;
  if (linear) {
    MTLK_CHECK_VALUE(saved.back().dim() == 2 && saved.back().size(1) == static_cast<int64_t>(spec.gate_experts.size()),
                     "the saved logits must have ", spec.gate_experts.size(), " columns, got ", saved.back().sizes());
    MTLK_CHECK_TYPE(saved.back().scalar_type() == inputs[0].scalar_type(), "the saved logits must be of ",
                    inputs[0].scalar_type(), ", got ", saved.back().scalar_type());
    logits = saved.back().split_with_sizes(spec.gate_sizes, 1);
  }
  const auto run = [&](const LevelSpec& reached, const LevelTensors& own, const Tensors& own_logits) {
    return gradients_of(reached, own, own_logits, grads, saved.slice(0, activations),
                        saved.slice(activations, statistics), spec.experts(), seed, needs);
  };
  if (grads.size() == used.size() && all_read(spec)) return run(spec, tensors, logits);
  const ReachedLevel part = spec.reached(used);
  return run(part.spec, part.pick(tensors), picked(logits, part.gates));
}

}  // namespace

Tensors serve_level(const LevelSpec& spec, const LevelTensors& tensors, const RunningNorms& norms) {
  RECORD_FUNCTION("mtlkernels::level_serve", {});
  return evaluate(spec, tensors, norms, std::nullopt, false).outputs;
}

void check_level(const LevelSpec& spec, const LevelTensors& tensors) {
  LevelTables tables(spec, tensors);
  dtype_of(tensors.inputs[0]);
  tensors.linear_gates ? tables.check_gate_layers() : tables.set_logits(tensors.gates);
}

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("level_forward", TORCH_FN(forward));
  m.impl("level_backward", TORCH_FN(backward));
}

}  // namespace mtlk
