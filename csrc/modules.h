// What lies in the dictionaries of PyTorch's modules, past their __getattr__.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// An entry of a dictionary by an interned name, borrowed; null for none.
inline PyObject* entry(PyObject* dictionary, PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(dictionary, name);
  if (!found) PyErr_Clear();
  return found;
}

// An object's own dictionary, which it keeps alive; null for none.
inline PyObject* dictionary_of(PyObject* object) {
  PyObject* const own = PyObject_GenericGetDict(object, nullptr);
  if (!own) return PyErr_Clear(), nullptr;
  Py_DECREF(own);
  return own;
}

// Of that dictionary, borrowed; null where it has none of that name.
inline PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* const own = dictionary_of(object);
  return own ? entry(own, name) : nullptr;
}

// An entry that is a dictionary and nothing more, whose order is that of its entries, borrowed; otherwise null.
inline PyObject* inner_dictionary(PyObject* own, PyObject* name) {
  PyObject* const found = own ? entry(own, name) : nullptr;
  return found && PyDict_CheckExact(found) ? found : nullptr;
}

// The same of an object's own dictionary.
inline PyObject* dictionary(PyObject* object, PyObject* name) {
  return object ? inner_dictionary(dictionary_of(object), name) : nullptr;
}

// A module among another's, borrowed; null where it has none of that name.
inline PyObject* submodule(PyObject* module, PyObject* name) {
  static PyObject* const modules = interned("_modules");
  PyObject* const own = dictionary(module, modules);
  return own ? entry(own, name) : nullptr;
}

// Whether there are hooks of one kind, or where they should be is something else.
inline bool has_hooks(PyObject* module, PyObject* kind) {
  PyObject* const hooks = attribute(module, kind);
  return !hooks || !PyDict_Check(hooks) || PyDict_Size(hooks) > 0;
}

// Those of which modules are plain.
struct ModuleTypes {
  PyObject *expert, *linear, *parameter, *dropout;
};

// Whether a module, by its dictionary, has a forward method of its own, as those have that bring their weights from
// elsewhere.
inline bool has_own_forward(PyObject* own) {
  static PyObject* const forward = interned("forward");
  return !own || entry(own, forward);
}

inline bool is_of(PyObject* object, PyObject* type) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type; }

// Weight and bias of a plain linear layer, borrowed; a bias of None is null. A null weight: it is not plain, as where
// its bias is no parameter but a buffer, or an attribute that torch.nn.utils.prune makes.
struct LinearLayer {
  LinearLayer(PyObject* layer, const ModuleTypes& types) {
    static PyObject *const parameters = interned("_parameters"), *const of_weight = interned("weight");
    static PyObject* const of_bias = interned("bias");
    PyObject* const all = is_of(layer, types.linear) ? dictionary_of(layer) : nullptr;
    PyObject* const own = has_own_forward(all) ? nullptr : inner_dictionary(all, parameters);
    if (own) weight = entry(own, of_weight);
    if (!weight || !is_of(weight, types.parameter)) {
      weight = nullptr;
      return;
    }
    bias = entry(own, of_bias);
    if (!bias) weight = nullptr;
    if (bias == Py_None) bias = nullptr;
  }
  PyObject *weight = nullptr, *bias = nullptr;
};

// Whether an expert, by its submodules, now has no norm and no dropout that drops.
inline bool is_bare(PyObject* parts, const ModuleTypes& types) {
  static PyObject *const of_norms = interned("norms"), *const of_dropout = interned("dropout"),
                         *const p = interned("p");
  static PyObject *const modules = interned("_modules"), *const training = interned("training");
  PyObject* const norms = dictionary(entry(parts, of_norms), modules);
  if (!norms || PyDict_Size(norms) > 0) return false;
  PyObject* const dropout = entry(parts, of_dropout);
  PyObject* const own = dropout && is_of(dropout, types.dropout) ? dictionary_of(dropout) : nullptr;
  if (has_own_forward(own)) return false;
  PyObject* const rate = entry(own, p);
  const bool drops = !rate || !(PyFloat_CheckExact(rate) || PyLong_CheckExact(rate)) || PyObject_IsTrue(rate) != 0;
  return !drops || entry(own, training) == Py_False;
}

// What experts have in common: whether all are bare, and their activation's code, borrowed.
struct InCommon {
  bool bare = true;
  PyObject* activation = nullptr;
};

// visit(expert, layer, its LinearLayer) for each of experts of mtlkernels.nn, which are modules by their names, until
// it returns false. Returns false then, and where an expert or a layer is not of the plain types, has a forward method
// of its own or, if `heard`, a forward hook, or where experts differ in their activation, in their number of layers or
// in whether a layer has a bias.
template <typename F>
bool each_linear(PyObject* experts, const ModuleTypes& types, bool heard, InCommon& common, F visit) {
  static PyObject *const linears = interned("linears"), *const modules = interned("_modules");
  static PyObject *const forward_hooks = interned("_forward_hooks"), *const code = interned("_code");
  if (!PyDict_CheckExact(experts)) return false;
  constexpr Py_ssize_t kLayers = 64;  // of which the biases are compared
  uint64_t biased = 0;
  Py_ssize_t layers = 0;
  PyObject *expert, *layer;
  for (Py_ssize_t at = 0, e = 0; PyDict_Next(experts, &at, nullptr, &expert); ++e) {
    PyObject* const of_expert = is_of(expert, types.expert) ? dictionary_of(expert) : nullptr;
    if (has_own_forward(of_expert) || (heard && has_hooks(expert, forward_hooks))) return false;
    PyObject* const parts = inner_dictionary(of_expert, modules);
    if (!parts) return false;
    PyObject* const activation = entry(of_expert, code);  // one of the small ints, of which there is one object each
    if (e == 0) common.activation = activation;
    if (!activation || activation != common.activation) return false;
    common.bare = common.bare && is_bare(parts, types);
    PyObject* const own = dictionary(entry(parts, linears), modules);
    if (!own || (e > 0 && PyDict_Size(own) != layers)) return false;
    layers = PyDict_Size(own);
    if (layers > kLayers) return false;
    for (Py_ssize_t next = 0, i = 0; PyDict_Next(own, &next, nullptr, &layer); ++i) {
      const LinearLayer linear(layer, types);
      if (!linear.weight || (heard && has_hooks(layer, forward_hooks))) return false;
      const uint64_t bit = uint64_t{linear.bias != nullptr} << i;
      if (e == 0) biased |= bit;
      if ((biased & uint64_t{1} << i) != bit || !visit(e, i, linear)) return false;
    }
  }
  return true;
}

}  // namespace mtlk
