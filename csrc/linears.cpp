// Takes weights and biases out of modules at each call, which in Python would take a tenth of a call of one row.

#include "linears.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Of an object's own dictionary, borrowed; null where it has none of that name.
PyObject* attribute(PyObject* object, PyObject* name) {
  const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!own) return PyErr_Clear(), nullptr;
  return PyDict_GetItem(own.ptr(), name);
}

// The same, which is to be a dictionary and nothing more, whose order is that of its entries.
PyObject* dictionary(PyObject* object, PyObject* name) {
  PyObject* const found = object ? attribute(object, name) : nullptr;
  return found && PyDict_CheckExact(found) ? found : nullptr;
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

bool has_hooks(PyObject* module) {
  static PyObject* const name = interned("_forward_hooks");
  PyObject* const hooks = attribute(module, name);
  return !hooks || !PyDict_Check(hooks) || PyDict_Size(hooks) > 0;
}

// Of all experts, layer by layer.
class Linears {
 public:
  explicit Linears(Py_ssize_t experts) : experts_(experts) {}

  void set(Py_ssize_t layer, Py_ssize_t expert, PyObject* weight, PyObject* bias) {
    if (expert == 0) {
      weights_.append(py::list(experts_));
      biases_.append(bias && bias != Py_None ? py::object(py::list(experts_)) : py::none());
    }
    put(weights_, layer, expert, weight);
    put(biases_, layer, expert, bias ? bias : Py_None);
  }
  Py_ssize_t layers() const { return PyList_GET_SIZE(weights_.ptr()); }
  py::object take() { return py::make_tuple(std::move(weights_), std::move(biases_)); }

 private:
  static void put(const py::list& lists, Py_ssize_t layer, Py_ssize_t expert, PyObject* value) {
    PyObject* const list = PyList_GET_ITEM(lists.ptr(), layer);
    if (list != Py_None) PyList_SET_ITEM(list, expert, Py_NewRef(value));
  }

  const Py_ssize_t experts_;
  py::list weights_, biases_;
};

}  // namespace

// Weights and biases by layer, then expert, None in the place of a layer's biases where its first expert has none.
// `experts` are modules by their names. Returns None where one is not of the plain types, or, if `heard`, has a forward
// hook, or they differ in their number of layers: then mtlkernels/nn/level.py looks closer.
py::object linears_of_experts(py::handle experts, py::handle expert_type, py::handle linear_type,
                              py::handle parameter_type, bool heard) {
  static PyObject *const modules = interned("_modules"), *const parameters = interned("_parameters");
  static PyObject *const linears = interned("linears"), *const weight_name = interned("weight");
  static PyObject* const bias_name = interned("bias");
  const auto is = [](PyObject* object, py::handle type) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.ptr();
  };
  if (!PyDict_CheckExact(experts.ptr())) return py::none();
  Linears found(PyDict_Size(experts.ptr()));
  PyObject *expert, *layer;
  for (Py_ssize_t at = 0, e = 0; PyDict_Next(experts.ptr(), &at, nullptr, &expert); ++e) {
    if (!is(expert, expert_type) || (heard && has_hooks(expert))) return py::none();
    PyObject* const parts = dictionary(expert, modules);
    PyObject* const layers = parts ? dictionary(PyDict_GetItem(parts, linears), modules) : nullptr;
    if (!layers || (e > 0 && PyDict_Size(layers) != found.layers())) return py::none();
    for (Py_ssize_t next = 0, i = 0; PyDict_Next(layers, &next, nullptr, &layer); ++i) {
      PyObject* const own = dictionary(layer, parameters);
      PyObject* const weight = own ? PyDict_GetItem(own, weight_name) : nullptr;
      if (!weight || !is(layer, linear_type) || !is(weight, parameter_type) || (heard && has_hooks(layer))) {
        return py::none();
      }
      found.set(i, e, weight, PyDict_GetItem(own, bias_name));
    }
  }
  return found.take();
}

}  // namespace mtlk
