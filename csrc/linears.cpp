// Takes weights and biases out of modules at each call, which in Python would take a tenth of a call of one row.

#include "linears.h"

#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "modules.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Of all experts, one after another. Lists are made when all are there: memory for a list may have Python collect what
// nobody refers to, whose code may exchange parameters.
class Linears {
 public:
  // Layer `number` of the next expert; false where the first one's has another shape.
  bool add(const LinearLayer& linear, size_t number) {
    weights_.push_back(py::reinterpret_borrow<py::object>(linear.weight));
    biases_.push_back(linear.bias ? py::reinterpret_borrow<py::object>(linear.bias) : py::object());
    return THPVariable_Unpack(linear.weight).sizes() == THPVariable_Unpack(weights_[number].ptr()).sizes();
  }

  // Layer by layer.
  py::object take(size_t experts, bool bare) {
    py::list weights, biases;
    const size_t layers = experts == 0 ? 0 : weights_.size() / experts;
    for (size_t i = 0; i < layers; ++i) {
      weights.append(layer(weights_, i, layers));
      biases.append(biases_[i] ? py::object(layer(biases_, i, layers)) : py::none());
    }
    return py::make_tuple(std::move(weights), std::move(biases), bare);
  }

 private:
  static py::list layer(std::vector<py::object>& values, size_t number, size_t layers) {
    py::list found(values.size() / layers);
    for (size_t e = 0; e < values.size() / layers; ++e) {
      PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(e), values[e * layers + number].release().ptr());
    }
    return found;
  }

  std::vector<py::object> weights_, biases_;
};

}  // namespace

// Weights and biases by layer, then expert, None in the place of a layer's biases where it has none; and whether all
// experts are bare, see `is_bare`. `experts` are modules by their names. Returns None where `each_linear` has something
// to say against one: then mtlkernels/nn/level.py looks closer.
py::object linears_of_experts(py::handle experts, py::handle expert_type, py::handle linear_type,
                              py::handle parameter_type, py::handle dropout_type, bool heard) {
  if (!PyDict_CheckExact(experts.ptr())) return py::none();
  const auto count = static_cast<size_t>(PyDict_Size(experts.ptr()));
  Linears found;
  const ModuleTypes types{expert_type.ptr(), linear_type.ptr(), parameter_type.ptr(), dropout_type.ptr()};
  const auto add = [&](Py_ssize_t, Py_ssize_t number, const LinearLayer& linear) {
    return found.add(linear, static_cast<size_t>(number));
  };
  InCommon common;
  return each_linear(experts.ptr(), types, heard, common, add) ? found.take(count, common.bare) : py::none();
}

}  // namespace mtlk
