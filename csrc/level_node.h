// A level in autograd's graph without Python: the node of a call by the direct way.
//
// A Function in Python takes longer than a small level, and longer with each tensor that it is applied to. This one
// holds the same tensors, and runs the level's backward operator where nobody looks on; whatever else a backward pass
// may be, one that is differentiated again, traced, or of several losses at once, it hands to that Function in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string_view>

#include "cpu/level/spec.h"

namespace mtlk {

// The spec of 64-bit ints that lie side by side, without floats.
LevelSpec spec_of_words(std::string_view words);

// Whether nothing but its memory stands behind a tensor on the CPU or a GPU, so that the dispatcher has nobody else to
// ask.
bool is_plain(const at::Tensor& tensor);

// Whether a Python object is a tensor by its type. PyTorch's own check believes what an object says of its class, and
// runs its code for that.
inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Whether forward-mode differentiation goes through a tensor.
bool has_tangent(const at::Tensor& tensor);

// Whether someone wants to see what a call or a backward pass does, or stands behind these tensors, or has given them
// tangents; or gradients are recorded. Undefined tensors are None.
bool is_observed(at::TensorList tensors);

// The outputs of a level without norms, dropout and slopes, of which gradients are wanted. `held`: the same tensors,
// whose memory stays. `by_name`: "cpp" was asked for.
Tensors trained_level(const LevelSpec& spec, const LevelTensors& tensors, const LevelTensors& held, bool by_name);

// mtlkernels._C.recorded_level, LevelContext and level_context, see level_node.cpp.
void define_level_node(pybind11::module_& module);

}  // namespace mtlk
