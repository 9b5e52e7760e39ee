// Casts of many tensors at once: each alone would take a call of PyTorch's, which for small ones takes the longer part.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "runtime/api.h"

namespace mtlk {

// Whether a tensor is one of float32, bfloat16 or float16 whose values lie side by side in memory that is there.
MTLK_API bool is_cast_at_once(const at::Tensor& tensor);

// Copies in this dtype, with the tensors' strides. Of tensors for which is_cast_at_once holds, which are all in float32
// where the dtype is one of half precision, or all in one of half precision where the dtype is float32.
MTLK_API std::vector<at::Tensor> cast_at_once(at::TensorList tensors, at::ScalarType dtype);

}  // namespace mtlk
