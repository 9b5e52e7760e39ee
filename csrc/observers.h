// Who looks on at a call, and which tensors are nothing but memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

namespace mtlk {

// Whether nothing but its memory stands behind a tensor on the CPU or a GPU, so that the dispatcher has nobody else to
// ask.
bool is_plain(const at::Tensor& tensor);

// Whether a Python object is a tensor by its type. PyTorch's own check believes what an object says of its class, and
// runs its code for that.
inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Whether what is done with tensors that want gradients is recorded. Below autograd it is not, whether gradients are
// switched on or not: in the kernels of custom operators and within torch.inference_mode.
inline bool records_gradients() {
  return at::GradMode::is_enabled() &&
         !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradFunctionality);
}

// Whether forward-mode differentiation goes through a tensor.
bool has_tangent(const at::Tensor& tensor);

// Whether someone wants to see what a call or a backward pass does, or stands behind these tensors, or has given them
// tangents. Undefined tensors are None.
bool is_watched(at::TensorList tensors);

// The same, or gradients are recorded.
bool is_observed(at::TensorList tensors);

// Looks up what is_observed knows modes by; once, when the module is loaded.
void find_observers();

}  // namespace mtlk
