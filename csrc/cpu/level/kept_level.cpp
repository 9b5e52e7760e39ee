#include "level/kept_level.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <utility>

#include "level/chain.h"
#include "level/level.h"
#include "runtime/check.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

// The same memory, not owned.
at::Tensor borrowed(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  check_plain(tensor);
  MTLK_CHECK_VALUE(tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.numel() > 0,
                   "parameters must be dense tensors on the CPU, none of them empty");
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       at::TensorOptions().dtype(tensor.dtype()));
}

void borrow(Tensors& tensors) {
  for (at::Tensor& tensor : tensors) tensor = borrowed(tensor);
}

LevelTensors borrowed(const LevelSpec& spec, LevelTensors tensors) {
  MTLK_CHECK_VALUE(!spec.stores_inputs() && tensors.linear_gates && tensors.inputs.empty(),
                   "a chain with linear gates was expected");
  for (Tensors* of_kind : {&tensors.weights, &tensors.biases, &tensors.gates, &tensors.gate_biases}) borrow(*of_kind);
  const at::Tensor& first = tensors.weights.at(0);
  MTLK_CHECK_VALUE(first.defined() && first.dim() == 2, "weights[0] must be a matrix");
  tensors.inputs.assign(spec.num_inputs, at::empty({0, first.size(1)}, first.options()));
  return tensors;
}

RunningNorms borrowed(RunningNorms norms) {
  for (std::vector<NormTensors>* of_kind : {&norms.experts, &norms.gates}) {
    for (NormTensors& norm : *of_kind) {
      for (at::Tensor* part : {&norm.mean, &norm.variance, &norm.weight, &norm.bias}) *part = borrowed(*part);
    }
  }
  return norms;
}

bool lie_row_by_row(const LevelTensors& tensors) {
  const auto rows = [](const at::Tensor& weight) { return weight.dim() == 2 && weight.stride(1) == 1; };
  const auto dense = [](const at::Tensor& bias) { return !bias.defined() || bias.is_contiguous(); };
  const auto all = [](const Tensors& of_kind, const auto& holds) {
    return std::all_of(of_kind.begin(), of_kind.end(), holds);
  };
  return all(tensors.weights, rows) && all(tensors.gates, rows) && all(tensors.biases, dense) &&
         all(tensors.gate_biases, dense);
}

}  // namespace

KeptLevel::KeptLevel(LevelSpec spec, const LevelTensors& parameters, const RunningNorms& norms)
    : spec_(std::move(spec)),
      tensors_(borrowed(spec_, parameters)),
      norms_(borrowed(norms)),
      declared_(all_declared(parameters.weights)),
      as_they_lie_(lie_row_by_row(tensors_)),
      tables_(spec_, tensors_) {
  tables_.set_natural_weights();
  tables_.set_natural_gate_layers();
  const LevelShape& level = tables_.level();
  for (int64_t i = 0; i < spec_.layers() * spec_.experts(); ++i) {
    norm_widths_.push_back(level.widths[i / spec_.experts() + 1]);
  }
}

std::optional<Tensors> KeptLevel::serve(const Tensors& inputs) const {
  MTLK_CHECK_VALUE(inputs.size() == tensors_.inputs.size(), "inputs must hold ", tensors_.inputs.size(),
                   " tensors, got ", inputs.size());
  const at::Tensor& like = tensors_.inputs[0];
  bool as_they_lie = as_they_lie_;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& x = inputs[i];
    check_dense("inputs", i, x, like.scalar_type());
    MTLK_CHECK_VALUE(x.dim() == 2 && x.size(1) == like.size(1) && x.size(0) == inputs[0].size(0), "inputs[", i,
                     "] must have shape [B, ", like.size(1), "], got ", x.sizes());
    as_they_lie = as_they_lie && x.stride(1) == 1;
  }
  const auto& kernels =
      kernels_for<ChainKernels>(dtype_of(like), inputs[0].size(0), tables_.product_width(), &Pays::forward);
  if (as_they_lie && kernels.engine.form == WeightForm::kNatural) return serve_by_tables(inputs, kernels);
  if (declared_) return std::nullopt;
  LevelTensors tensors = tensors_;
  tensors.inputs = inputs;
  return serve_level(spec_, tensors, norms_);
}

Tensors KeptLevel::serve_by_tables(const Tensors& inputs, const ChainKernels& kernels) const {
  RECORD_FUNCTION("mtlkernels::level_serve", {});
  LevelShape level = tables_.level();
  std::vector<const void*> pointers;
  std::vector<int64_t> ld;
  for (const at::Tensor& x : inputs) {
    pointers.push_back(x.const_data_ptr());
    ld.push_back(x.stride(0));
  }
  level.rows = inputs[0].size(0);
  level.inputs = pointers.data();
  level.input_ld = ld.data();
  const at::Tensor& like = tensors_.inputs[0];
  const bool wide = like.scalar_type() == at::kDouble;
  std::optional<FoldedNorms> norms, gate_norms;
  if (!norms_.experts.empty()) {
    norms.emplace(norms_.experts, norm_widths_, level.biases, kernels.fold_norm, wide, "norms");
    level.scales = norms->scales();
    level.shifts = norms->shifts();
  }
  if (!norms_.gates.empty()) {
    gate_norms.emplace(norms_.gates, spec_.gate_sizes.vec(), level.gates.biases, kernels.fold_norm, wide, "gate norms");
    level.gates.scales = gate_norms->scales();
    level.gates.shifts = gate_norms->shifts();
  }
  return serve_chain(level, like.options(), kernels);
}

}  // namespace mtlk
