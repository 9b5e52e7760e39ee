// What the host does again and again for calls on a GPU that are alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace mtlk {

// What a replayed call returns, undefined ones standing for None. Python seldom looks at it: an object for each
// gradient of a parameter would take it longer than the launches.
struct Results {
  std::vector<at::Tensor> tensors;
};

// A tensor for Python, None for an undefined one.
pybind11::object to_python(at::Tensor tensor);

// mtlkernels._C.signature, Recording and Results, see recording.cpp.
void define_recording(pybind11::module_& module);

}  // namespace mtlk
