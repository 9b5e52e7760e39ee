// Builds the kernels' view of gates from tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "level/level_args.h"
#include "runtime/tensors.h"

namespace mtlk {

// Owns what a Gates points to.
class GateTables {
 public:
  // Gates whose logits are set later.
  GateTables(at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, int64_t experts);
  GateTables(const GateTables&) = delete;

  // Of so many rows, beside experts of a dtype.
  void set_logits(at::TensorList logits, int64_t rows, at::ScalarType experts);

  // Linear layers in the place of logits, as Gates describes them.
  void set_weights(const void* const* weights, const int64_t* ld, const void* const* biases, const int* streams);

  // Of norms behind those layers.
  void set_norms(const void* const* scales, const void* const* shifts);

  const Gates& gates() const { return gates_; }

 private:
  std::vector<int> sizes_, begin_, use_begin_;
  std::vector<GateUse> uses_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> row_stride_, column_stride_;
  Gates gates_{};
};

}  // namespace mtlk
