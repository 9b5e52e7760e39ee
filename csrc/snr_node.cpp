#include "snr_node.h"

#include <pybind11/gil_safe_call_once.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/runtime/check.h"
#include "cpu/runtime/tensors.h"
#include "cpu/snr/snr.h"
#include "nodes.h"
#include "observers.h"

namespace mtlk {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a node keeps beside tensors, by name: numbers, which compiled autograd hashes.
const std::string kInputs = "inputs", kOutputs = "outputs";  // how many
const std::string kOptions = "options";                      // bits of those below
constexpr int64_t kTransforms = 1, kClosedGrad = 2, kCppByName = 4;

bool any_wants_gradient(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

// The inputs, the weights and z, one after another.
SnrTensors grouped(at::TensorList all, int64_t inputs, bool transforms) {
  const auto last = static_cast<int64_t>(all.size()) - 1;
  const at::TensorList weights = all.slice(inputs, last - inputs);
  SnrTensors result{{}, {}, held(all[last]), transforms};
  for (const at::Tensor& input : all.slice(0, inputs)) result.inputs.push_back(held(input));
  for (const at::Tensor& weight : weights) result.weights.push_back(held(weight));
  return result;
}

// mtlkernels.ops._snr.gradients_of_node.
const py::object& gradients_of_node() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> function;
  return function
      .call_once_and_store_result([] { return py::module_::import("mtlkernels.ops._snr").attr("gradients_of_node"); })
      .get_stored();
}

struct SnrFunction : torch::autograd::Function<SnrFunction> {
  static constexpr const char* kName = "mtlkernels::RoutesBackward";

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const int64_t inputs = context->saved_data.at(kInputs).toInt(), options = context->saved_data.at(kOptions).toInt();
    const variable_list all = context->get_saved_variables();  // once: checkpointing computes it anew each time
    if (std::none_of(grads.begin(), grads.end(), [](const at::Tensor& grad) { return grad.defined(); })) {
      return variable_list(all.size());
    }
    std::vector<bool> needs;
    for (size_t edge = 0; edge < all.size(); ++edge) needs.push_back(context->needs_input_grad(edge));
    const bool transforms = (options & kTransforms) != 0, closed_grad = (options & kClosedGrad) != 0;
    if (!is_observed(grads) && !is_watched(all)) {
      const auto any = [&](int64_t first, int64_t last) {
        return std::find(needs.begin() + first, needs.begin() + last, true) != needs.begin() + last;
      };
      const auto z = static_cast<int64_t>(all.size()) - 1;
      return differentiate_routes(grouped(all, inputs, transforms), grads, {any(0, inputs), any(inputs, z), needs[z]},
                                  closed_grad);
    }
    return with_python([&] {
      py::list flags;
      for (const bool need : needs) flags.append(need);
      return unwrapped(gradients_of_node()(transforms ? "snr_trans" : "snr_aver", inputs,
                                           context->saved_data.at(kOutputs).toInt(), closed_grad,
                                           (options & kCppByName) != 0, flags, wrapped(all), wrapped(grads)));
    });
  }
};

// A list of rows, each with a matrix for every input; or one tensor of all of them.
bool read_matrices(PyObject* weight, size_t inputs, Tensors& weights) {
  if (is_tensor(weight)) return read_tensor(weight, weights.emplace_back()) && weights[0].dim() == 4;
  const auto read = [&](PyObject* row) {
    const size_t before = weights.size();
    return read_tensors(row, weights) && weights.size() == before + inputs;
  };
  return read_each(weight, read) && !(weights.size() == 1 && weights[0].dim() == 4);
}

// The outputs of mtlkernels.snr_trans, or of snr_aver, which has no weight; None: the call is not for this way. `u` is
// a list; `by_name`: "cpp" was asked for.
py::object routes_from_python(bool transforms, py::handle u, py::handle weight, py::handle z, bool closed_grad,
                              bool by_name) {
  try {
    Tensors given;
    if (!read_tensors(u.ptr(), given)) return py::none();
    const auto inputs = static_cast<int64_t>(given.size());
    if (transforms) {
      Tensors weights;
      if (!read_matrices(weight.ptr(), given.size(), weights)) return py::none();
      std::move(weights.begin(), weights.end(), std::back_inserter(given));
    }
    if (!read_tensor(z.ptr(), given.emplace_back())) return py::none();
    const bool wanted = records_gradients() && any_wants_gradient(given);
    const SnrTensors tensors = grouped(given, inputs, transforms);
    Tensors outputs;
    {
      const py::gil_scoped_release release;  // see has_tangent
      outputs = evaluate_routes(tensors);
      if (wanted) {
        attach_node<SnrFunction>(given, outputs, [&](AutogradContext& context) {
          context.saved_data[kInputs] = inputs;
          context.saved_data[kOutputs] = static_cast<int64_t>(outputs.size());
          context.saved_data[kOptions] =
              int64_t{transforms ? kTransforms : 0} | (closed_grad ? kClosedGrad : 0) | (by_name ? kCppByName : 0);
          context.save_for_backward(given);
        });
      }
    }
    return wrapped_groups<py::tuple>({&outputs});
  } catch (const Refused&) {
    return py::none();
  }
}

}  // namespace

void define_snr_node(py::module_& module) {
  module.def("routes", &routes_from_python,
             "mtlkernels.snr_trans, or else snr_aver, by the direct way: outputs, or None: not its call.");
}

}  // namespace mtlk
