#include "level/level_tables.h"

#include <algorithm>
#include <numeric>

#include "gemm/mean_width.h"
#include "runtime/check.h"

namespace mtlk {

LevelTables::LevelTables(const LevelSpec& spec, const LevelTensors& tensors)
    : spec_(spec),
      tensors_(tensors),
      dtype_(tensors.inputs.empty() ? at::ScalarType::Undefined : tensors.inputs[0].scalar_type()),
      gates_(spec.gate_experts, spec.gate_sizes, spec.experts()),
      order_(spec.experts()) {
  check_experts();
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int a, int b) { return spec.expert_inputs[a] < spec.expert_inputs[b]; });
  for (const at::Tensor& x : tensors.inputs) add_rows(x, inputs_, input_ld_);
  level_.rows = tensors.inputs[0].size(0);
  level_.experts = static_cast<int>(spec.experts());
  level_.layers = static_cast<int>(spec.layers());
  level_.widths = widths_.data();
  level_.activations = spec.activations.data();
  level_.expert_inputs = spec.expert_inputs.data();
  level_.order = order_.data();
  level_.numbers = spec.numbers.data();
  level_.last_places = (spec.signs_suffice(dtype_of(tensors.inputs[0])) ? spec.last_places : spec.numbers).data();
  level_.inputs = inputs_.data();
  level_.input_ld = input_ld_.data();
  level_.biases = biases_.data();
  level_.gates = gates_.gates();
}

int64_t LevelTables::product_width() const {
  MeanWidth width;
  for (size_t l = 1; l < widths_.size(); ++l) width.add(widths_[l - 1], widths_[l]);
  return width();
}

void LevelTables::check_experts() {
  const Tensors &inputs = tensors_.inputs, &weights = tensors_.weights;
  const size_t experts = spec_.experts(), count = experts * spec_.layers();
  MTLK_CHECK_VALUE(static_cast<int64_t>(inputs.size()) == spec_.num_inputs, "inputs must hold ", spec_.num_inputs,
                   " tensors, got ", inputs.size());
  MTLK_CHECK_VALUE(weights.size() == count, "weights must hold ", count, " tensors, got ", weights.size());
  MTLK_CHECK_VALUE(tensors_.biases.size() == count, "biases must hold ", count, " entries, got ",
                   tensors_.biases.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_dense("inputs", i, inputs[i], dtype_);
    MTLK_CHECK_VALUE(inputs[i].dim() == 2 && inputs[i].sizes() == inputs[0].sizes(), "inputs[", i,
                     "] must have shape [B, D] as inputs[0], got ", inputs[i].sizes());
  }
  widths_.push_back(inputs[0].size(1));
  for (size_t i = 0; i < count; ++i) {
    check_dense("weights", i, weights[i], dtype_);
    MTLK_CHECK_VALUE(weights[i].dim() == 2, "weights[", i, "] must be a matrix");
    if (i % experts == 0) widths_.push_back(weights[i].size(0));
    const int64_t out = widths_[i / experts + 1], in = widths_[i / experts];
    MTLK_CHECK_VALUE(weights[i].size(0) == out && weights[i].size(1) == in, "weights[", i, "] must have shape [", out,
                     ", ", in, "], got ", weights[i].sizes());
    biases_.push_back(bias_of(tensors_.biases[i], out, "biases", i));
  }
}

// The address of a bias of `size` elements, null for none.
const void* LevelTables::bias_of(const at::Tensor& bias, int64_t size, const char* name, size_t i) {
  if (!bias.defined()) return nullptr;
  check_dense(name, i, bias, dtype_);
  MTLK_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == size, name, "[", i, "] must have shape [", size, "], got ",
                   bias.sizes());
  kept_.push_back(bias.contiguous());
  return kept_.back().const_data_ptr();
}

// A tensor [rows, n], with unit column stride, which is kept as long as this lives.
void LevelTables::add_rows(const at::Tensor& x, std::vector<const void*>& pointers, std::vector<int64_t>& ld) {
  kept_.push_back(x.stride(1) == 1 ? x : x.contiguous());
  pointers.push_back(kept_.back().const_data_ptr());
  ld.push_back(kept_.back().stride(0));
}

void LevelTables::set_norms(const std::vector<NormTensors>& norms, FoldNorm fold) {
  if (norms.empty()) return;
  std::vector<int64_t> widths;
  for (size_t i = 0; i < biases_.size(); ++i) widths.push_back(widths_[i / level_.experts + 1]);
  norms_.emplace(norms, widths, biases_.data(), fold, dtype_ == at::kDouble, "norms");
  level_.scales = norms_->scales();
  level_.shifts = norms_->shifts();
}

void LevelTables::set_logits(at::TensorList logits) {
  gates_.set_logits(logits, level_.rows, dtype_);
  level_.gates = gates_.gates();
}

void LevelTables::check_gate_layers() {
  const Tensors &weights = tensors_.gates, &biases = tensors_.gate_biases;
  const size_t count = spec_.gates(), streams = tensors_.inputs.size();
  MTLK_CHECK_VALUE(weights.size() == count && biases.size() == count,
                   "gate_weights and gate_biases must hold an entry for each of ", count, " gates");
  MTLK_CHECK_VALUE(!spec_.gate_inputs.empty() || streams == 1 || streams >= count,
                   "there must be a stream for each of ", count, " gates, got ", streams);
  for (size_t k = 0; k < count; ++k) {
    check_dense("gate_weights", k, weights[k], dtype_);
    MTLK_CHECK_VALUE(
        weights[k].dim() == 2 && weights[k].size(0) == spec_.gate_sizes[k] && weights[k].size(1) == widths_[0],
        "gate_weights[", k, "] must have shape [", spec_.gate_sizes[k], ", ", widths_[0], "], got ",
        weights[k].sizes());
    gate_biases_.push_back(bias_of(biases[k], spec_.gate_sizes[k], "gate_biases", k));
    const size_t own = streams == 1 ? 0 : k;
    gate_streams_.push_back(static_cast<int>(spec_.gate_inputs.empty() ? own : spec_.gate_inputs[k]));
  }
}

void LevelTables::set_gate_layers(const std::vector<NormTensors>& norms, const ChainKernels& kernels) {
  check_gate_layers();
  if (!norms.empty()) {
    gate_norms_.emplace(norms, spec_.gate_sizes.vec(), gate_biases_.data(), kernels.fold_norm, dtype_ == at::kDouble,
                        "gate norms");
    gates_.set_norms(gate_norms_->scales(), gate_norms_->shifts());
  }
  gate_weights_.set(tensors_.gates, kernels.engine, false);
  point_gate_layers();
}

void LevelTables::set_natural_gate_layers() {
  check_gate_layers();
  gate_weights_.set_natural(tensors_.gates);
  point_gate_layers();
}

void LevelTables::point_gate_layers() {
  gates_.set_weights(gate_weights_.pointers(), gate_weights_.ld(), gate_biases_.data(), gate_streams_.data());
  level_.gates = gates_.gates();
}

void LevelTables::set_grad_outputs(at::TensorList grad_outputs) {
  const int64_t rows = level_.rows, features = widths_.back();
  for (size_t k = 0; k < grad_outputs.size(); ++k) {
    check_dense("grad_outputs", k, grad_outputs[k], dtype_);
    MTLK_CHECK_VALUE(grad_outputs[k].sizes() == at::IntArrayRef({rows, features}), "grad_outputs[", k,
                     "] must have shape [", rows, ", ", features, "], got ", grad_outputs[k].sizes());
    add_rows(grad_outputs[k], grad_outputs_, grad_output_ld_);
  }
}

void LevelTables::set_saved(at::TensorList saved, const SavedShape& shape) {
  for (size_t l = 0; l < saved.size(); ++l) {
    const bool signs = shape.signs && l + 1 == saved.size();
    const std::vector<int64_t> sizes =
        signs ? std::vector<int64_t>{shape.experts - shape.last_experts, level_.rows, sign_bytes(widths_.back())}
              : shape.sizes(static_cast<int64_t>(l), level_.rows, widths_[l + 1]);
    check_dense("saved", l, saved[l], signs ? at::kByte : dtype_);
    MTLK_CHECK_VALUE(saved[l].sizes() == at::IntArrayRef(sizes), "saved[", l, "] must have shape ",
                     at::IntArrayRef(sizes), ", got ", saved[l].sizes());
    kept_.push_back(saved[l].contiguous());
    saved_.push_back(kept_.back().const_data_ptr());
    if (signs) signs_ = static_cast<const uint8_t*>(saved_.back());
  }
}

void LevelTables::set_natural_weights() {
  weights_.set_natural(tensors_.weights);
  point_weights();
}

void LevelTables::set_backward_weights(const EngineTable& engine) {
  weights_.set(tensors_.weights, engine, engine.backward_transposed);
  point_weights();
}

void LevelTables::set_forward_weights(const EngineTable& engine, bool kept) {
  if (kept || engine.form != WeightForm::kPrepared) {
    weights_.set(tensors_.weights, engine, false);
  } else {
    weights_.set_to_be_made(tensors_.weights, engine);
  }
  point_weights();
}

void LevelTables::set_weights(const GroupForms& forms) {
  level_.weights = forms.pointers();
  level_.weight_ld = forms.ld();
}

void LevelTables::set_last_weights(const EngineTable& engine) {
  if (!engine.backward_transposed) return;
  last_weights_.emplace().set(at::TensorList(tensors_.weights).slice((spec_.layers() - 1) * spec_.experts()), engine,
                              false);
}

void LevelTables::point_weights() {
  level_.weights = weights_.pointers();
  level_.weight_ld = weights_.ld();
  level_.weight_columns = weights_.columns();
}

}  // namespace mtlk
