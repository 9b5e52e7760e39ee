// Builds the kernels' view of a level of experts from an operator's arguments.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>

#include "gemm/weight_forms.h"
#include "level/folded_norms.h"
#include "level/gate_layers.h"
#include "level/gates_args.h"

namespace mtlk {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Owns what a Level points to, and whatever had to be copied to fit the kernels.
class LevelTables {
 public:
  LevelTables(at::TensorList inputs, at::TensorList weights, at::IntArrayRef expert_inputs,
              at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, at::IntArrayRef activations)
      : gates_(gate_experts, gate_sizes, static_cast<int64_t>(expert_inputs.size())),
        experts_(expert_inputs.size()),
        activations_(activations.begin(), activations.end()),
        expert_inputs_(expert_inputs.begin(), expert_inputs.end()),
        order_(experts_) {
    check(inputs, weights);
    widths_.push_back(inputs[0].size(1));
    for (size_t l = 0; l < activations_.size(); ++l) widths_.push_back(weights[l * experts_].size(0));
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return expert_inputs_[a] < expert_inputs_[b]; });
    for (const at::Tensor& x : inputs) {
      rows_of(x);
      input_pointers_.push_back(kept_.back().const_data_ptr());
      input_ld_.push_back(kept_.back().stride(0));
    }
    biases_.assign(weights.size(), nullptr);
    level_.rows = inputs[0].size(0);
    level_.experts = static_cast<int>(experts_);
    level_.layers = static_cast<int>(activations_.size());
    level_.widths = widths_.data();
    level_.activations = activations_.data();
    level_.expert_inputs = expert_inputs_.data();
    level_.order = order_.data();
    level_.inputs = input_pointers_.data();
    level_.input_ld = input_ld_.data();
    level_.biases = biases_.data();
    level_.gates = gates_.gates();
  }
  LevelTables(const LevelTables&) = delete;

  const Level& level() const { return level_; }

  void set_biases(const OptionalTensors& biases) {
    std::vector<at::Tensor> tensors;
    for (size_t i = 0; i < biases.size(); ++i) tensors.push_back(biases.get(i).value_or(at::Tensor()));
    set_biases(tensors);
  }
  // Undefined tensors stand for no bias.
  void set_biases(const std::vector<at::Tensor>& biases) {
    TORCH_CHECK_VALUE(biases.size() == biases_.size(), "mtlkernels: biases must hold ", biases_.size(),
                      " entries, got ", biases.size());
    for (size_t i = 0; i < biases.size(); ++i) biases_[i] = bias_of(biases[i], widths_[i / experts_ + 1], "biases", i);
  }

  // Batch norms by running statistics behind the experts' layers, after their biases; empty without any.
  void set_norms(const std::vector<NormTensors>& norms, FoldNorm fold) {
    if (norms.empty()) return;
    std::vector<int64_t> widths;
    for (size_t i = 0; i < biases_.size(); ++i) widths.push_back(widths_[i / experts_ + 1]);
    norms_.emplace(norms, widths, biases_.data(), fold, dtype_ == at::kDouble, "norms");
    level_.scales = norms_->scales();
    level_.shifts = norms_->shifts();
  }

  void set_logits(at::TensorList logits) {
    gates_.set_logits(logits);
    check_gates(logits, gates_.gates(), level_.rows, dtype_);
    level_.gates = gates_.gates();
  }

  // Linear layers in the place of logits: gate k's reads stream k, or the only one. Kernels that want prepared weights
  // get logits after all, as so narrow a layer is nothing to prepare for.
  // `norms` stand behind them, or it is empty.
  void set_gate_layers(at::TensorList inputs, const std::vector<at::Tensor>& weights,
                       const std::vector<at::Tensor>& biases, const std::vector<NormTensors>& norms, FoldNorm fold,
                       WeightForm form) {
    check_gate_layers(inputs, weights, biases);
    if (!norms.empty()) fold_gates(norms, fold);
    if (form == WeightForm::kPrepared) {
      if (norms.empty()) return set_joined_logits(gate_logits(inputs, weights, biases));
      return set_joined_logits(normalized_logits(gate_logits(inputs, weights, {weights.size(), at::Tensor()}), biases));
    }
    for (const at::Tensor& weight : weights) {
      rows_of(form == WeightForm::kCompute && dtype_ != at::kDouble ? weight.to(at::kFloat) : weight);
      gate_weights_.push_back(kept_.back().const_data_ptr());
      gate_weight_ld_.push_back(kept_.back().stride(0));
    }
    gates_.set_weights(gate_weights_, gate_weight_ld_, gate_biases_, gate_streams_);
    level_.gates = gates_.gates();
  }

  // Their products, which are the logits: [B, sum of the gates' sizes].
  at::Tensor set_gate_products(at::TensorList inputs, const std::vector<at::Tensor>& weights,
                               const std::vector<at::Tensor>& biases) {
    check_gate_layers(inputs, weights, biases);
    const at::Tensor logits = gate_logits(inputs, weights, biases);
    set_joined_logits(logits);
    return logits;
  }

  void set_joined_logits(const at::Tensor& logits) {
    const Gates& gates = gates_.gates();
    TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) == gates.columns, "mtlkernels: logits must have ",
                      gates.columns, " columns, got ", logits.sizes());
    kept_.push_back(logits);
    set_logits(logits.split_with_sizes(std::vector<int64_t>(gates.sizes, gates.sizes + gates.count), 1));
  }

  void check_gate_layers(at::TensorList inputs, const std::vector<at::Tensor>& weights,
                         const std::vector<at::Tensor>& biases) {
    const Gates& gates = gates_.gates();
    const size_t count = gates.count;
    TORCH_CHECK_VALUE(weights.size() == count && biases.size() == count,
                      "mtlkernels: gate_weights and gate_biases must hold an entry for each of ", count, " gates");
    TORCH_CHECK_VALUE(inputs.size() == 1 || inputs.size() >= count, "mtlkernels: there must be a stream for each of ",
                      count, " gates, got ", inputs.size());
    for (size_t k = 0; k < count; ++k) {
      check_like(weights[k], dtype_, "gate_weights", k);
      TORCH_CHECK_VALUE(
          weights[k].dim() == 2 && weights[k].size(0) == gates.sizes[k] && weights[k].size(1) == widths_[0],
          "mtlkernels: gate_weights[", k, "] must have shape [", gates.sizes[k], ", ", widths_[0], "], got ",
          weights[k].sizes());
      gate_biases_.push_back(bias_of(biases[k], gates.sizes[k], "gate_biases", k));
      gate_streams_.push_back(inputs.size() == 1 ? 0 : static_cast<int>(k));
    }
  }

  void set_grad_outputs(at::TensorList grad_outputs) {
    const int64_t rows = level_.rows, features = widths_.back();
    TORCH_CHECK_VALUE(static_cast<int>(grad_outputs.size()) == level_.gates.count,
                      "mtlkernels: grad_outputs must hold a tensor for each of ", level_.gates.count, " gates, got ",
                      grad_outputs.size());
    for (size_t k = 0; k < grad_outputs.size(); ++k) {
      check_like(grad_outputs[k], dtype_, "grad_outputs", k);
      TORCH_CHECK_VALUE(grad_outputs[k].sizes() == at::IntArrayRef({rows, features}), "mtlkernels: grad_outputs[", k,
                        "] must have shape [", rows, ", ", features, "], got ", grad_outputs[k].sizes());
      rows_of(grad_outputs[k]);
      grad_outputs_.push_back(kept_.back().const_data_ptr());
      grad_output_ld_.push_back(kept_.back().stride(0));
    }
  }

  // What the forward pass saved of the first `layers` layers.
  void set_saved(at::TensorList saved, int layers) {
    const int64_t rows = level_.rows;
    TORCH_CHECK_VALUE(static_cast<int>(saved.size()) == layers, "mtlkernels: saved must hold a tensor for each of ",
                      layers, " layers, got ", saved.size());
    for (size_t l = 0; l < saved.size(); ++l) {
      check_like(saved[l], dtype_, "saved", l);
      TORCH_CHECK_VALUE(saved[l].sizes() == at::IntArrayRef({static_cast<int64_t>(experts_), rows, widths_[l + 1]}),
                        "mtlkernels: saved[", l, "] must have shape [", experts_, ", ", rows, ", ", widths_[l + 1],
                        "], got ", saved[l].sizes());
      kept_.push_back(saved[l].contiguous());
      saved_.push_back(kept_.back().const_data_ptr());
    }
  }
  const void* const* grad_outputs() const { return grad_outputs_.data(); }
  const int64_t* grad_output_ld() const { return grad_output_ld_.data(); }
  const void* const* saved() const { return saved_.data(); }

  void set_natural_weights(at::TensorList weights) {
    weights_.set_natural(weights);
    point_weights();
  }
  void set_weights(at::TensorList weights, const EngineTable& engine, bool transposed) {
    weights_.set(weights, engine, transposed);
    point_weights();
  }
  // Weights for a forward pass, which makes those ready as it goes that are in no fitting form, unless all are `kept`
  // in one.
  void set_forward_weights(at::TensorList weights, const EngineTable& engine, bool kept) {
    if (kept || engine.form != WeightForm::kPrepared) return set_weights(weights, engine, false);
    weights_.set_to_be_made(weights, engine);
    point_weights();
  }
  void set_weights(const GroupForms& forms) {
    level_.weights = forms.pointers();
    level_.weight_ld = forms.ld();
  }

  // The last layer's weights as the forward pass wants them, after the backward pass's.
  void set_last_weights(at::TensorList weights, const EngineTable& engine) {
    if (!engine.backward_transposed) return;
    last_weights_.emplace().set(weights.slice(weights.size() - experts_), engine, false);
  }
  const void* const* last_weights() const {
    return last_weights_ ? last_weights_->pointers() : weights_.pointers() + (activations_.size() - 1) * experts_;
  }
  const int64_t* last_weight_ld() const {
    return last_weights_ ? last_weights_->ld() : weights_.ld() + (activations_.size() - 1) * experts_;
  }

 private:
  void fold_gates(const std::vector<NormTensors>& norms, FoldNorm fold) {
    const Gates& gates = gates_.gates();
    const std::vector<int64_t> widths(gates.sizes, gates.sizes + gates.count);
    gate_norms_.emplace(norms, widths, gate_biases_.data(), fold, dtype_ == at::kDouble, "gate norms");
    gates_.set_norms(gate_norms_->scales(), gate_norms_->shifts());
  }

  // Logits of products: those of gates without a norm get their biases.
  at::Tensor normalized_logits(const at::Tensor& products, const std::vector<at::Tensor>& biases) const {
    const Gates& gates = gates_.gates();
    const at::ScalarType compute = dtype_ == at::kDouble ? at::kDouble : at::kFloat;
    const auto options = products.options().dtype(compute);
    const at::Tensor scale = at::ones({gates.columns}, options), shift = at::zeros({gates.columns}, options);
    for (int k = 0; k < gates.count; ++k) {
      const int64_t first = gates.begin[k], bytes = gates.sizes[k] * static_cast<int64_t>(scale.element_size());
      if (gates.scales[k]) {
        std::memcpy(scale.narrow(0, first, gates.sizes[k]).mutable_data_ptr(), gates.scales[k], bytes);
        std::memcpy(shift.narrow(0, first, gates.sizes[k]).mutable_data_ptr(), gates.shifts[k], bytes);
      } else if (biases[k].defined()) {
        shift.narrow(0, first, gates.sizes[k]).copy_(biases[k]);
      }
    }
    return at::addcmul(shift, products.to(compute), scale);
  }

  // The address of a bias of `size` elements, null for none.
  const void* bias_of(const at::Tensor& bias, int64_t size, const char* name, size_t i) {
    if (!bias.defined()) return nullptr;
    TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == size, "mtlkernels: ", name, "[", i, "] must have shape [",
                      size, "], got ", bias.sizes());
    check_like(bias, dtype_, name, i);
    kept_.push_back(bias.contiguous());
    return kept_.back().const_data_ptr();
  }

  // Keeps a tensor [rows, n] with unit column stride as long as this lives.
  void rows_of(const at::Tensor& x) { kept_.push_back(x.stride(1) == 1 ? x : x.contiguous()); }

  static void check_like(const at::Tensor& tensor, at::ScalarType dtype, const char* name, size_t i) {
    check_plain(tensor);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype && tensor.layout() == at::kStrided, "mtlkernels: ", name, "[", i,
                     "] must be a dense tensor of ", dtype, ", got ", tensor.layout(), " of ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.is_cpu(), "mtlkernels: ", name, "[", i, "] must be on the CPU, got ", tensor.device());
  }

  // All that the kernels rely on, so that a direct call of an operator cannot read out of bounds. The public functions
  // check the same in Python, where messages know the caller's nesting.
  void check(at::TensorList inputs, at::TensorList weights) {
    TORCH_CHECK_VALUE(!inputs.empty() && !weights.empty(), "mtlkernels: there must be an input and a layer");
    dtype_ = inputs[0].scalar_type();
    for (size_t i = 0; i < inputs.size(); ++i) {
      check_like(inputs[i], dtype_, "inputs", i);
      TORCH_CHECK_VALUE(inputs[i].dim() == 2 && inputs[i].sizes() == inputs[0].sizes(), "mtlkernels: inputs[", i,
                        "] must have shape [B, D] as inputs[0], got ", inputs[i].sizes());
    }
    for (const int stream : expert_inputs_) {
      TORCH_CHECK_VALUE(stream >= 0 && stream < static_cast<int64_t>(inputs.size()),
                        "mtlkernels: expert_inputs must name streams in [0, ", inputs.size(), "), got ", stream);
    }
    TORCH_CHECK_VALUE(weights.size() == experts_ * activations_.size(), "mtlkernels: weights must hold ",
                      experts_ * activations_.size(), " tensors, got ", weights.size());
    int64_t in = inputs[0].size(1), out = in;
    for (size_t i = 0; i < weights.size(); ++i) {
      check_like(weights[i], dtype_, "weights", i);
      TORCH_CHECK_VALUE(weights[i].dim() == 2, "mtlkernels: weights[", i, "] must be a matrix");
      if (i % experts_ == 0) {
        in = out;
        out = weights[i].size(0);
      }
      TORCH_CHECK_VALUE(weights[i].size(0) == out && weights[i].size(1) == in, "mtlkernels: weights[", i,
                        "] must have shape [", out, ", ", in, "], got ", weights[i].sizes());
    }
  }

  void point_weights() {
    level_.weights = weights_.pointers();
    level_.weight_ld = weights_.ld();
    level_.weight_columns = weights_.columns();
  }

  GateTables gates_;
  size_t experts_;
  std::vector<int> activations_, expert_inputs_, order_;
  std::vector<int64_t> widths_, input_ld_;
  std::vector<int64_t> grad_output_ld_;
  std::vector<const void*> input_pointers_, biases_, grad_outputs_, saved_;
  std::vector<const void*> gate_weights_, gate_biases_;
  std::vector<int64_t> gate_weight_ld_;
  std::vector<int> gate_streams_;
  std::vector<at::Tensor> kept_;
  WeightForms weights_;
  std::optional<WeightForms> last_weights_;
  at::ScalarType dtype_;
  std::optional<FoldedNorms> norms_, gate_norms_;
  Level level_{};
};

}  // namespace mtlk
