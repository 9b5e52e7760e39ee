// Builds the kernels' view of a level of experts from its tensors.
#pragma once

#include <optional>
#include <vector>

#include "gemm/weight_forms.h"
#include "level/folded_norms.h"
#include "level/gate_tables.h"
#include "level/level_kernels.h"
#include "level/spec.h"

namespace mtlk {

// Owns what a LevelShape points to, and whatever had to be copied to fit the kernels.
class LevelTables {
 public:
  // Checks inputs, weights and biases: all that the kernels rely on, so that a direct call of an operator cannot read
  // out of bounds. The public functions check the same in Python, where messages know the caller's nesting. What is
  // given must outlive this.
  LevelTables(const LevelSpec& spec, const LevelTensors& tensors);
  LevelTables(const LevelTables&) = delete;

  const LevelShape& level() const { return level_; }
  const std::vector<int>& gate_streams() const { return gate_streams_; }

  // Of one expert, see MeanWidth; the layers of all are alike.
  int64_t product_width() const;

  // Batch norms by running statistics behind the experts' layers, after their biases; there may be none.
  void set_norms(const std::vector<NormTensors>& norms, FoldNorm fold);

  void set_logits(at::TensorList logits);

  // Linear layers in the place of logits, with weights as the kernels want them; `norms` stand behind them, or it is
  // empty.
  void set_gate_layers(const std::vector<NormTensors>& norms, const ChainKernels& kernels);
  void set_natural_gate_layers();

  void check_gate_layers();

  // Of a backward pass: the outputs' gradients; and what the forward pass saved of the layers of a whole level.
  void set_grad_outputs(at::TensorList grad_outputs);
  void set_saved(at::TensorList saved, const SavedShape& shape);
  const void* const* grad_outputs() const { return grad_outputs_.data(); }
  const int64_t* grad_output_ld() const { return grad_output_ld_.data(); }
  const void* const* saved() const { return saved_.data(); }
  const uint8_t* signs() const { return signs_; }

  // The experts' weights in their natural form, or in that which the engine's backward pass wants.
  void set_natural_weights();
  void set_backward_weights(const EngineTable& engine);
  // Weights for a forward pass, which makes those ready as it goes that are in no fitting form, unless all are `kept`
  // in one.
  void set_forward_weights(const EngineTable& engine, bool kept);
  void set_weights(const GroupForms& forms);

  // The last layer's weights as the forward pass wants them, after the backward pass's.
  void set_last_weights(const EngineTable& engine);
  const void* const* last_weights() const { return last_forms().pointers() + last_offset(); }
  const int64_t* last_weight_ld() const { return last_forms().ld() + last_offset(); }

 private:
  void check_experts();
  const void* bias_of(const at::Tensor& bias, int64_t size, const char* name, size_t i);
  void add_rows(const at::Tensor& x, std::vector<const void*>& pointers, std::vector<int64_t>& ld);
  void point_gate_layers();
  void point_weights();
  const WeightForms& last_forms() const { return last_weights_ ? *last_weights_ : weights_; }
  int64_t last_offset() const { return last_weights_ ? 0 : (spec_.layers() - 1) * spec_.experts(); }

  const LevelSpec& spec_;
  const LevelTensors& tensors_;
  const at::ScalarType dtype_;
  GateTables gates_;
  std::vector<int> order_, gate_streams_;
  std::vector<int64_t> widths_, input_ld_, grad_output_ld_;
  std::vector<const void*> inputs_, biases_, grad_outputs_, saved_, gate_biases_;
  const uint8_t* signs_ = nullptr;
  Tensors kept_;
  WeightForms weights_, gate_weights_;
  std::optional<WeightForms> last_weights_;
  std::optional<FoldedNorms> norms_, gate_norms_;
  LevelShape level_{};
};

}  // namespace mtlk
