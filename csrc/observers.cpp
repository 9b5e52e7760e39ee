#include "observers.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

namespace mtlk {
namespace {

namespace py = pybind11;

// torch.utils._device.DeviceContext.
PyTypeObject* default_device = nullptr;

// Whether a torch-function mode is on but that of torch.set_default_device, which only makes tensors.
bool has_function_mode() {
  if (!at::impl::torch_function_mode_enabled()) return false;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i) {
    if (Py_TYPE(Modes::get_stack_at(i)->ptr(getPyInterpreter())) != default_device) return true;
  }
  return false;
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  static const uint64_t plain = [] {
    c10::DispatchKeySet keys({c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView});
    for (const auto backend : {c10::BackendComponent::CPUBit, c10::BackendComponent::CUDABit}) {
      keys =
          keys | c10::getAutogradRelatedKeySetFromBackend(backend) | c10::getAutocastRelatedKeySetFromBackend(backend);
    }
    return keys.raw_repr();
  }();
  return (tensor.key_set().raw_repr() & ~plain) == 0;
}

// Tensor::_fw_grad takes a lock that autograd holds while it waits for the GIL, as where it makes a leaf's accumulator
// in another thread; whoever comes here may have the GIL. What it reads under that lock becomes something once, for
// good.
bool has_tangent(const at::Tensor& tensor) {
  if (const auto* const own = torch::autograd::impl::get_autograd_meta(tensor)) {
    if (own->fw_grad_ && own->fw_grad_->contains(0)) return true;
  }
  const auto* const view = torch::autograd::impl::get_view_autograd_meta(tensor);
  return view && view->has_fw_view() && has_tangent(view->get_forward_view().base_);
}

// Without asking whether a forward-mode level is open, since that takes a lock, which a fork may find held by another
// thread.
bool is_watched(at::TensorList tensors) {
  static const c10::DispatchKeySet watchers({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                             c10::DispatchKey::FuncTorchVmapMode, c10::DispatchKey::VmapMode,
                                             c10::DispatchKey::Functionalize, c10::DispatchKey::Tracer});
  return has_function_mode() || c10::impl::dispatch_mode_enabled() ||
         !(c10::impl::tls_local_dispatch_key_set().included_ & watchers).empty() ||
         !std::all_of(tensors.begin(), tensors.end(),
                      [](const at::Tensor& t) { return !t.defined() || (is_plain(t) && !has_tangent(t)); });
}

bool is_observed(at::TensorList tensors) { return at::GradMode::is_enabled() || is_watched(tensors); }

void find_observers() {
  py::object context = py::module_::import("torch.utils._device").attr("DeviceContext");
  default_device = reinterpret_cast<PyTypeObject*>(context.release().ptr());  // for good
}

}  // namespace mtlk
