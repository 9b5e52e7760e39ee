#include "level/kept_level.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <utility>

#include "level/chain.h"
#include "runtime/check.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

// The same with inputs of no rows, which tell the tables what they have to know of inputs.
LevelTensors with_inputs(const LevelSpec& spec, LevelTensors tensors) {
  MTLK_CHECK_VALUE(!spec.stores_inputs() && tensors.linear_gates, "a chain with linear gates was expected");
  for (const Tensors* matrices : {&tensors.weights, &tensors.gates}) {
    for (const at::Tensor& weight : *matrices) {
      MTLK_CHECK_VALUE(weight.defined() && weight.dim() == 2 && weight.stride(1) == 1, "weights must lie row by row");
    }
  }
  for (const at::Tensor& bias : tensors.biases) {
    MTLK_CHECK_VALUE(!bias.defined() || bias.is_contiguous(), "biases must be contiguous");
  }
  const at::Tensor& first = tensors.weights.at(0);
  tensors.inputs.assign(spec.num_inputs, at::empty({0, first.size(1)}, first.options()));
  return tensors;
}

}  // namespace

KeptLevel::KeptLevel(LevelSpec spec, LevelTensors parameters)
    : spec_(std::move(spec)),
      tensors_(with_inputs(spec_, std::move(parameters))),
      tables_(spec_, tensors_),
      options_(tensors_.inputs[0].options()) {
  tables_.set_natural_weights();
  tables_.set_gates({}, nullptr, WeightForm::kNatural, false);
  tables_.let_go();
  tensors_ = {};
}

std::optional<Tensors> KeptLevel::serve(const Tensors& inputs) const {
  MTLK_CHECK_VALUE(static_cast<int64_t>(inputs.size()) == spec_.num_inputs, "inputs must hold ", spec_.num_inputs,
                   " tensors, got ", inputs.size());
  LevelShape level = tables_.level();
  const at::ScalarType dtype = c10::typeMetaToScalarType(options_.dtype());
  bool as_they_lie = true;
  std::vector<const void*> pointers;
  std::vector<int64_t> ld;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& x = inputs[i];
    check_dense("inputs", i, x, dtype);
    MTLK_CHECK_VALUE(x.dim() == 2 && x.size(1) == level.widths[0] && x.size(0) == inputs[0].size(0), "inputs[", i,
                     "] must have shape [B, ", level.widths[0], "], got ", x.sizes());
    as_they_lie = as_they_lie && x.stride(1) == 1;
    pointers.push_back(x.const_data_ptr());
    ld.push_back(x.stride(0));
  }
  level.rows = inputs[0].size(0);
  level.inputs = pointers.data();
  level.input_ld = ld.data();
  const auto& by_rows = kernels_for<KernelsByRows<ChainKernels>>(dtype_of(inputs[0]));
  const ChainKernels& kernels = by_rows.of(level.rows, by_rows.usual.min_forward_rows);
  if (kernels.engine.form != WeightForm::kNatural || !as_they_lie) return std::nullopt;
  RECORD_FUNCTION("mtlkernels::level_serve", {});
  return serve_chain(level, options_, kernels);
}

}  // namespace mtlk
