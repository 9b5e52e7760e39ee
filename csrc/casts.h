// What autocast casts, many tensors at once, in one node of autograd's graph.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mtlk {

// Puts differentiable copies in this dtype in the place of those in another that autocast casts: float32, float16 and
// bfloat16. Undefined tensors stay. Without the GIL: it copies weights, and makes leaves' nodes under a lock for which
// nobody is to wait with it.
void cast_together(const std::vector<at::Tensor*>& tensors, at::ScalarType dtype);

// mtlkernels._C.cast_together, see casts.cpp.
void define_casts(pybind11::module_& module);

}  // namespace mtlk
