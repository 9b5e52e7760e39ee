// What operators ask of the tensors that they are called with.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dtypes.h"
#include "runtime/api.h"

namespace mtlk {

// Refuses any dtype that kernels have not.
Dtype dtype_of(const at::Tensor& tensor);

// The tensor with its values in memory. PyTorch brings lists of optional tensors to kernels as they are: with a bit
// that says that they are negated, and zeros without memory.
at::Tensor resolved(const at::Tensor& tensor);

// The same memory, which stays: while C++ computes without Python's lock, another thread may give a parameter other
// memory, as `.data` and `Module.to` do.
MTLK_API at::Tensor held(const at::Tensor& tensor);

// Refuses tensors that are not what their memory holds, such as DTensors: calls that go past the dispatcher, which
// would have asked them, bring them here.
void check_plain(const at::Tensor& tensor);

// How many bytes of its memory a dense tensor's values reach.
MTLK_API size_t reached_bytes(const at::Tensor& tensor);

// Refuses what is not a dense tensor of this dtype on the CPU: an argument of this name, or an entry of one.
void check_dense(const char* name, const at::Tensor& x, at::ScalarType dtype);
void check_dense(const char* name, int64_t i, const at::Tensor& x, at::ScalarType dtype);

at::Tensor with_unit_stride(const at::Tensor& x);

}  // namespace mtlk
