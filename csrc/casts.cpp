#include "casts.h"

#include <ATen/record_function.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "arguments.h"
#include "cpu/cast/cast.h"
#include "nodes.h"
#include "observers.h"

namespace mtlk {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensors copies_of(at::TensorList tensors, at::ScalarType dtype) {
  RECORD_FUNCTION("mtlkernels::cast", {});
  return cast_at_once(tensors, dtype);
}

// Of casts from float32: gradients go back to it.
struct CastFunction : torch::autograd::Function<CastFunction> {
  static constexpr const char* kName = "mtlkernels::CastBackward";

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list found(grads.size());
    std::vector<size_t> places;
    Tensors at_once;
    const bool plain = !is_observed(grads);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined() || !context->needs_input_grad(i)) continue;
      const bool fits = plain && is_cast_at_once(grads[i]) && grads[i].scalar_type() != at::kFloat &&
                        (at_once.empty() || at_once[0].scalar_type() == grads[i].scalar_type());
      if (!fits) {
        found[i] = grads[i].to(at::kFloat);
        continue;
      }
      places.push_back(i);
      at_once.push_back(grads[i]);
    }
    if (at_once.empty()) return found;
    Tensors copies = copies_of(at_once, at::kFloat);
    for (size_t i = 0; i < places.size(); ++i) found[places[i]] = std::move(copies[i]);
    return found;
  }
};

// For Python: a list of tensors, some of them None, as cast_together leaves them; None where one is not plain, or
// somebody looks on.
py::object cast_from_python(py::handle items, py::handle dtype) {
  Tensors tensors;
  if (!THPDtype_Check(dtype.ptr()) || !read_tensors<true>(items.ptr(), tensors) || is_watched(tensors)) {
    return py::none();
  }
  std::vector<at::Tensor*> places;
  for (at::Tensor& tensor : tensors) places.push_back(&tensor);
  cast_together(places, reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type);
  return wrapped_groups<py::list>({&tensors});
}

}  // namespace

void cast_together(const std::vector<at::Tensor*>& tensors, at::ScalarType dtype) {
  const py::gil_scoped_release release;
  // Those that no gradient goes to stay so.
  std::vector<at::Tensor*> differentiated, constant;
  const bool records = records_gradients(), halves = dtype == at::kHalf || dtype == at::kBFloat16;
  for (at::Tensor* const tensor : tensors) {
    const at::ScalarType own = tensor->defined() ? tensor->scalar_type() : dtype;
    if (own == dtype || !(own == at::kFloat || own == at::kHalf || own == at::kBFloat16)) continue;
    if (halves && own == at::kFloat && is_cast_at_once(*tensor)) {
      (records && tensor->requires_grad() ? differentiated : constant).push_back(tensor);
    } else {
      *tensor = tensor->to(dtype);
    }
  }
  for (const auto* const places : {&constant, &differentiated}) {
    if (places->empty()) continue;
    Tensors group;
    for (const at::Tensor* const tensor : *places) group.push_back(*tensor);
    Tensors copies = copies_of(group, dtype);
    if (places == &differentiated) attach_node<CastFunction>(group, copies, [](AutogradContext&) {});
    for (size_t i = 0; i < places->size(); ++i) *(*places)[i] = std::move(copies[i]);
  }
}

void define_casts(py::module_& module) {
  module.def("cast_together", &cast_from_python,
             "Tensors of a list, or None among them, as autocast casts them to a dtype; None: not a call for it.");
}

}  // namespace mtlk
