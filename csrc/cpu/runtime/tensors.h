// What operators ask of the tensors that they are called with.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dtypes.h"

namespace mtlk {

// Refuses any dtype that kernels have not.
Dtype dtype_of(const at::Tensor& tensor);

// Refuses tensors that are not what their memory holds, such as DTensors: calls that go past the dispatcher, which
// would have asked them, bring them here.
void check_plain(const at::Tensor& tensor);

// Refuses what is not a dense tensor of this dtype on the CPU: an argument of this name, or an entry of one.
void check_dense(const char* name, const at::Tensor& x, at::ScalarType dtype);
void check_dense(const char* name, int64_t i, const at::Tensor& x, at::ScalarType dtype);

at::Tensor with_unit_stride(const at::Tensor& x);

}  // namespace mtlk
