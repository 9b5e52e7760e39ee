// Takes weights and biases out of modules at each call, which in Python would take a tenth of a call of one row.

#include "linears.h"

#include "modules.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Of all experts, layer by layer.
class Linears {
 public:
  explicit Linears(Py_ssize_t experts) : experts_(experts) {}

  void set(Py_ssize_t layer, Py_ssize_t expert, const LinearLayer& linear) {
    if (expert == 0) {
      weights_.append(py::list(experts_));
      biases_.append(linear.bias ? py::object(py::list(experts_)) : py::none());
    }
    put(weights_, layer, expert, linear.weight);
    if (linear.bias) put(biases_, layer, expert, linear.bias);
  }
  py::object take() { return py::make_tuple(std::move(weights_), std::move(biases_)); }

 private:
  static void put(const py::list& lists, Py_ssize_t layer, Py_ssize_t expert, PyObject* value) {
    PyList_SET_ITEM(PyList_GET_ITEM(lists.ptr(), layer), expert, Py_NewRef(value));
  }

  const Py_ssize_t experts_;
  py::list weights_, biases_;
};

}  // namespace

// Weights and biases by layer, then expert, None in the place of a layer's biases where it has none. `experts` are
// modules by their names. Returns None where `each_linear` has something to say against one: then
// mtlkernels/nn/level.py looks closer.
py::object linears_of_experts(py::handle experts, py::handle expert_type, py::handle linear_type,
                              py::handle parameter_type, bool heard) {
  if (!PyDict_CheckExact(experts.ptr())) return py::none();
  Linears found(PyDict_Size(experts.ptr()));
  const ModuleTypes types{expert_type.ptr(), linear_type.ptr(), parameter_type.ptr()};
  const bool plain =
      each_linear(experts.ptr(), types, heard, [&](Py_ssize_t e, Py_ssize_t i, const LinearLayer& linear) {
        found.set(i, e, linear);
        return true;
      });
  return plain ? found.take() : py::none();
}

}  // namespace mtlk
