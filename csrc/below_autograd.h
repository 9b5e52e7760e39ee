// Operators without gradients, past Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>
#include <vector>

namespace mtlk {

// The nodes where gradients of leaves arrive, alive as long as this is.
struct Accumulators {
  using NodePtr = decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));
  std::vector<NodePtr> nodes;
};

// PyTorch makes such a node under a lock of the leaf, and may wait for the GIL meanwhile. Whoever takes that lock with
// the GIL, as where a Function in Python is applied or a view made, waits for ever if another thread is there. Where
// there is a node it is held briefly; so these are made without the GIL, for whoever has it. Null where no leaf is
// among them.
std::unique_ptr<Accumulators> accumulators_of(at::TensorList tensors);

// mtlkernels._C.pass_below_autograd, see below_autograd.cpp.
void define_below_autograd(pybind11::module_& module);

}  // namespace mtlk
