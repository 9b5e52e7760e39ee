// Lists of gradients that go to PCGrad's C++ kernels: read from Python once for both passes, where the operators would
// read thousands of tensors twice.

#include "gradient_lists.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>

#include <memory>
#include <utility>

#include "arguments.h"
#include "cpu/pcgrad/gradient_lists.h"
#include "cpu/runtime/check.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// What Python holds is a capsule: an instance of a class of pybind11 does not survive an allocation that fails.
const GradientLists& lists_in(py::handle capsule) {
  return *static_cast<const GradientLists*>(py::reinterpret_borrow<py::capsule>(capsule).get_pointer());
}

// None where the lists are not of plain tensors, or a gradient of one is wanted; or C++ refuses them.
py::object lists_from_python(py::handle grads, int64_t tasks) {
  Tensors found;
  if (PyList_Check(grads.ptr())) found.reserve(PyList_GET_SIZE(grads.ptr()));
  if (!read_tensors<true>(grads.ptr(), found)) return py::none();
  const bool wanted = records_gradients() && std::any_of(found.begin(), found.end(), [](const at::Tensor& grad) {
                        return grad.defined() && grad.requires_grad();
                      });
  if (wanted) return py::none();
  try {
    auto lists = std::make_unique<GradientLists>(std::move(found), tasks);
    py::capsule capsule(lists.get(), [](void* kept) { delete static_cast<GradientLists*>(kept); });
    lists.release();
    return capsule;
  } catch (const Refused&) {
    return py::none();
  }
}

at::Tensor gram(py::handle capsule) {
  const GradientLists& lists = lists_in(capsule);
  const py::gil_scoped_release release;
  const at::AutoDispatchBelowADInplaceOrView below;
  RECORD_FUNCTION("mtlkernels::pcgrad_gram", {});
  return lists.gram();
}

py::object combine(py::handle capsule, const at::Tensor& coefficients) {
  const GradientLists& lists = lists_in(capsule);
  Tensors results;
  {
    const py::gil_scoped_release release;
    const at::AutoDispatchBelowADInplaceOrView below;
    RECORD_FUNCTION("mtlkernels::pcgrad_combine", {});
    results = lists.combine(coefficients);
  }
  return wrapped_groups<py::list>({&results});
}

}  // namespace

void define_gradient_lists(py::module_& module) {
  module.def("gradient_lists", &lists_from_python, "What is kept of a call's gradients, or None: not a call for it.");
  module.def("gram_of_lists", &gram, "The tasks' inner products.");
  module.def("combine_lists", &combine, "For each parameter the sum of its gradients by coefficients, or None.");
}

}  // namespace mtlk
