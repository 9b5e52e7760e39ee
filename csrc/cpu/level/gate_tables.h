// Builds the kernels' view of gates and dtypes from tensors.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "level/level_args.h"

namespace mtlk {

// Throws a TypeError for a dtype that there are no kernels for.
Dtype dtype_of(const at::Tensor& tensor);

// Refuses tensors that are not what their memory holds, such as DTensors: calls that go past the dispatcher, which
// would have asked them, bring them here.
void check_plain(const at::Tensor& tensor);

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
