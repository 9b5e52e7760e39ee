// Autograd past Python. What it does to an operator on CPUs where there is nothing to record: in C++, as Python's
// kernel would turn some eighty tensors into Python objects and back, and a packaged or compiled model of a few rows
// waits for that at each of its levels.

#include "below_autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "observers.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Whether a tensor among these has tangents, or, where `records`, wants gradients.
bool any_differentiated(const c10::IValue& value, bool records) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    return tensor.defined() && ((records && tensor.requires_grad()) || has_tangent(tensor));
  }
  if (!value.isTensorList() && !value.isOptionalTensorList()) return false;
  const auto items = value.toListRef();
  return std::any_of(items.begin(), items.end(), [&](const auto& item) { return any_differentiated(item, records); });
}

void autograd_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const bool records = at::GradMode::is_enabled();
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const c10::DispatchKeySet below = keys & c10::after_autograd_keyset;
  if (c10::impl::dispatch_mode_enabled() ||
      std::any_of(arguments.begin(), arguments.end(), [&](const auto& a) { return any_differentiated(a, records); })) {
    // Python's kernel, which has the keys of autograd that no other has.
    return op.redispatchBoxed(below | c10::DispatchKeySet(c10::DispatchKey::AutogradOther), stack);
  }
  // Whoever holds the GIL keeps it, as AOTInductor's Python class does while a package runs: another thread would take
  // it to wait for that package's lock, and this one would wait for the GIL.
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(below, stack);
}

void pass_below_autograd(const std::string& name) {
  static auto* const library =
      new torch::Library(torch::Library::IMPL, "mtlkernels", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__);
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&autograd_kernel>());
}

// For Python: what to hold, or None.
py::object accumulators_of_arguments(const py::tuple& arguments) {
  Tensors tensors;
  for (const py::handle argument : arguments) {
    if (is_tensor(argument.ptr())) tensors.push_back(THPVariable_Unpack(argument.ptr()));
  }
  auto found = accumulators_of(tensors);
  if (!found) return py::none();
  py::capsule held(found.get(), [](void* pointer) { delete static_cast<Accumulators*>(pointer); });
  return found.release(), held;
}

}  // namespace

std::unique_ptr<Accumulators> accumulators_of(at::TensorList tensors) {
  Tensors leaves;
  for (const at::Tensor& tensor : tensors) {
    const auto* const own = torch::autograd::impl::get_autograd_meta(tensor);
    if (own && own->requires_grad_ && !own->grad_fn_) leaves.push_back(tensor);
  }
  if (leaves.empty()) return nullptr;
  auto found = std::make_unique<Accumulators>();
  const py::gil_scoped_release release;
  for (const at::Tensor& leaf : leaves) found->nodes.push_back(torch::autograd::impl::grad_accumulator(leaf));
  return found;
}

void define_below_autograd(py::module_& module) {
  module.def("accumulators_of", &accumulators_of_arguments,
             "What to hold while a Function is applied to these arguments.");
  module.def("pass_below_autograd", &pass_below_autograd,
             "Lets an operator pass autograd on CPUs without Python where there is nothing to record.");
}

}  // namespace mtlk
