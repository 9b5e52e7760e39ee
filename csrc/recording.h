// What the host does again and again for calls on a GPU that are alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

namespace mtlk {

// What a replayed call returns, undefined ones standing for None. Python seldom looks at it: an object for each
// gradient of a parameter would take it longer than the launches.
struct Results {
  std::vector<at::Tensor> tensors;
};

// A tensor for Python, None for an undefined one.
pybind11::object to_python(at::Tensor tensor);

// What of moving and of fixed tensors a call's launches depend on, as bytes, or None: mtlkernels._C.signature of
// tensors that are here. Undefined ones stand for None.
pybind11::object signature(std::initializer_list<at::TensorList> moving, std::initializer_list<at::TensorList> fixed);

// mtlkernels._C.signature, Recording and Results, see recording.cpp.
void define_recording(pybind11::module_& module);

}  // namespace mtlk
