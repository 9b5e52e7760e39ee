#include "snapshot.h"

#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Layout.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "modules.h"
#include "observers.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// What of a module's dictionary has no say in what it computes.
constexpr std::array<std::string_view, 9> kBookkeeping = {
    "_non_persistent_buffers_set", "_is_full_backward_hook",       "_state_dict_hooks",
    "_state_dict_pre_hooks",       "_load_state_dict_pre_hooks",   "_load_state_dict_post_hooks",
    "_forward_hooks_with_kwargs",  "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
};
// What has to be empty.
constexpr std::array<std::string_view, 4> kHooks = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                                                    "_backward_pre_hooks"};

template <size_t N>
bool is_among(const std::array<std::string_view, N>& names, PyObject* name) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(name, &size);
  if (!text) return PyErr_Clear(), false;  // there are strings that have no UTF-8
  return std::find(names.begin(), names.end(), std::string_view(text, size)) != names.end();
}

// Whether somebody listens to a tensor's gradient, or to its accumulation.
bool has_gradient_hooks(PyObject* tensor) {
  const auto* const own = reinterpret_cast<THPVariable*>(tensor);
  for (PyObject* const hooks : {own->backward_hooks, own->post_accumulate_grad_hooks}) {
    if (hooks && hooks != Py_None && !(PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) == 0)) return true;
  }
  return false;
}

// What a module's class has of that name, which may be given to it later.
PyObject* method_of(PyObject* module, PyObject* name) { return _PyType_Lookup(Py_TYPE(module), name); }

PyObject* forward_name() {
  static PyObject* const name = interned("forward");
  return name;
}
PyObject* call_name() {
  static PyObject* const name = interned("__call__");
  return name;
}

bool is_sequence(PyObject* object) { return PyList_CheckExact(object) || PyTuple_CheckExact(object); }

}  // namespace

bool is_fixed(PyObject* object) {
  if (object == Py_None || PyBool_Check(object) || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
      PyComplex_CheckExact(object) || PyUnicode_CheckExact(object) || PyBytes_CheckExact(object)) {
    return true;
  }
  if (THPDtype_Check(object) || THPDevice_Check(object) || THPLayout_Check(object) || PyType_Check(object)) return true;
  if (PyCFunction_Check(object)) {
    PyObject* const self = PyCFunction_GET_SELF(object);
    return !self || PyModule_Check(self) || PyType_Check(self);
  }
  if (!PyFunction_Check(object) || PyFunction_GET_CLOSURE(object) || PyFunction_GET_KW_DEFAULTS(object)) return false;
  PyObject* const defaults = PyFunction_GET_DEFAULTS(object);
  for (Py_ssize_t i = 0; defaults && i < PyTuple_GET_SIZE(defaults); ++i) {
    if (!is_fixed(PyTuple_GET_ITEM(defaults, i))) return false;
  }
  return true;
}

Known::Known(const at::Tensor& tensor)
    : data_(tensor.const_data_ptr()),
      bytes_(tensor.storage().nbytes()),
      sizes_(tensor.sizes()),
      strides_(tensor.strides()),
      keys_(tensor.key_set().raw_repr()),
      type_(tensor.scalar_type()) {}

bool Known::is_like(const at::Tensor& now) const {
  return now.key_set().raw_repr() == keys_ && now.scalar_type() == type_ && now.sizes() == sizes_ &&
         now.strides() == strides_ && !has_tangent(now);
}

bool Known::is_there(const at::Tensor& now) const {
  return now.const_data_ptr() == data_ && now.storage().nbytes() == bytes_;
}

bool KnownTensors::take(const at::Tensor& tensor) {
  if (!tensor.defined()) return known_.emplace_back(), true;
  if (!is_plain(tensor) || has_tangent(tensor)) return false;
  known_.emplace_back(tensor);
  storages_.insert(tensor.storage().unsafeGetStorageImpl());
  return true;
}

bool KnownTensors::holds(const at::Tensor& tensor) const {
  return storages_.count(tensor.storage().unsafeGetStorageImpl()) > 0;
}

KnownTensors::Comparison::Comparison(const KnownTensors& known, std::vector<c10::Storage>& held)
    : next_(known.known_.begin()), end_(known.known_.end()), held_(held) {
  held.reserve(known.known_.size());
}

bool KnownTensors::Comparison::next(const at::Tensor& now) {
  if (next_ == end_ || next_->has_value() != now.defined()) return false;
  if (now.defined()) {
    if (!(*next_)->is(now)) return false;
    held_.push_back(now.storage());
  }
  ++next_;
  return true;
}

std::optional<Snapshot> Snapshot::of(PyObject* roots, PyObject* module_type, Tensors tensors, py::list& held) {
  Snapshot found(tensors);
  if (!found.take(roots, Taking{module_type, held})) return std::nullopt;
  return found;
}

bool Snapshot::is(PyObject* roots, std::vector<c10::Storage>* held) const {
  if (held) held->reserve(tensors_.size());
  Cursor at{entries_.data(), held};
  return same(roots, at);
}

bool Snapshot::holds(const at::Tensor& tensor) const {
  return storages_.count(tensor.storage().unsafeGetStorageImpl()) > 0;
}

bool Snapshot::take(PyObject* object, Taking taking) {
  constexpr int kMostDeep = 64;  // a dictionary may hold itself
  if (++taking.depth > kMostDeep) return false;
  const bool by_object = of_tensors_ == Tensors::kObjects;
  if (is_tensor(object)) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (!is_plain(tensor) || has_tangent(tensor)) return false;
    // What is made anew for each call is no object to compare; and one that was computed leads to all that it was
    // computed of.
    if (by_object && (!taking.in_module || has_gradient_hooks(object) || !tensor.is_leaf())) return false;
    entries_.push_back({Kind::kTensor, static_cast<int64_t>(tensors_.size()), object, Py_TYPE(object), nullptr,
                        tensor.requires_grad()});
    taking.held.append(py::handle(reinterpret_cast<PyObject*>(Py_TYPE(object))));
    tensors_.emplace_back(tensor);
    storages_.insert(tensor.storage().unsafeGetStorageImpl());
    objects_.insert(object);
    return true;
  }
  if (is_sequence(object)) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    entries_.push_back({Kind::kSequence, count, nullptr, Py_TYPE(object)});
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
      if (!take(PySequence_Fast_GET_ITEM(object, i), taking)) return false;
    }
    return PySequence_Fast_GET_SIZE(object) == count;
  }
  if (PyDict_Check(object)) {
    if (PyDict_GET_SIZE(object) == 0) return entries_.push_back({Kind::kEmpty}), true;
    if (!PyDict_CheckExact(object)) return false;  // whose order may be another than that of its entries
    entries_.push_back({Kind::kDict, PyDict_GET_SIZE(object)});
    return take_entries(object, taking, false);
  }
  if (is_fixed(object)) {
    taking.held.append(py::handle(object));
    entries_.push_back({Kind::kSame, 0, object});
    return true;
  }
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(taking.module_type))) return false;
  if (!modules_.insert(object).second) return entries_.push_back({Kind::kSeen, 0, object}), true;
  PyObject* const own = dictionary_of(object);
  if (!own) return false;
  taking.held.append(py::handle(reinterpret_cast<PyObject*>(Py_TYPE(object))));
  entries_.push_back({Kind::kModule, PyDict_GET_SIZE(own), object, Py_TYPE(object)});
  PyObject *const forward = method_of(object, forward_name()), *const call = method_of(object, call_name());
  for (PyObject* const method : {forward, call}) {
    if (method) taking.held.append(py::handle(method));
  }
  entries_.back().forward = forward;
  entries_.back().call = call;
  objects_.insert(object);
  taking.in_module = true;
  return take_entries(own, taking, true);
}

bool Snapshot::take_entries(PyObject* dictionary, Taking taking, bool of_module) {
  PyObject *key, *value;
  for (Py_ssize_t next = 0; PyDict_Next(dictionary, &next, &key, &value);) {
    if (!is_fixed(key)) return false;
    const py::object name = py::reinterpret_borrow<py::object>(key), held = py::reinterpret_borrow<py::object>(value);
    taking.held.append(name);
    const size_t place = entries_.size();
    const bool named = PyUnicode_CheckExact(key);
    if (named && PyUnicode_CompareWithASCIIString(key, "parametrizations") == 0) return false;
    if (of_module && named && PyUnicode_CompareWithASCIIString(key, "forward") == 0) return false;
    if (of_module && named && is_among(kBookkeeping, key)) {
      entries_.push_back({Kind::kIgnored});
    } else if (of_module && named && is_among(kHooks, key)) {
      if (!PyDict_Check(value) || PyDict_GET_SIZE(value) > 0) return false;
      entries_.push_back({Kind::kEmpty});
    } else if (!take(value, taking)) {
      return false;
    }
    entries_[place].key = key;
  }
  return true;
}

bool Snapshot::same(PyObject* object, Cursor& at) const {
  const Entry& entry = *at.next++;
  switch (entry.kind) {
    case Kind::kSame:
    case Kind::kSeen:
      return object == entry.object;
    case Kind::kTensor: {
      if (!same_tensor(object, entry)) return false;
      if (at.held) at.held->push_back(THPVariable_Unpack(object).storage());
      return true;
    }
    case Kind::kEmpty:
      return PyDict_Check(object) && PyDict_GET_SIZE(object) == 0;
    case Kind::kIgnored:
      return true;
    case Kind::kDict:
      return PyDict_CheckExact(object) && same_entries(object, at, entry.count);
    case Kind::kSequence: {
      if (Py_TYPE(object) != entry.type || PySequence_Fast_GET_SIZE(object) != entry.count) return false;
      for (int64_t i = 0; i < entry.count; ++i) {
        if (!same(PySequence_Fast_GET_ITEM(object, i), at)) return false;
      }
      return true;
    }
    case Kind::kModule: {
      if (object != entry.object || Py_TYPE(object) != entry.type) return false;
      if (method_of(object, forward_name()) != entry.forward || method_of(object, call_name()) != entry.call)
        return false;
      PyObject* const own = dictionary_of(object);
      return own && same_entries(own, at, entry.count);
    }
  }
  return false;
}

bool Snapshot::same_tensor(PyObject* object, const Entry& entry) const {
  if (Py_TYPE(object) != entry.type) return false;
  const Known& known = tensors_[entry.count];
  const at::Tensor& now = THPVariable_Unpack(object);
  if (of_tensors_ == Tensors::kPlaces) return known.is(now);
  return object == entry.object && known.is_like(now) && now.requires_grad() == entry.wants_gradient &&
         !has_gradient_hooks(object);
}

bool Snapshot::same_entries(PyObject* dictionary, Cursor& at, int64_t count) const {
  if (PyDict_GET_SIZE(dictionary) != count) return false;
  PyObject *key, *value;
  for (Py_ssize_t place = 0; PyDict_Next(dictionary, &place, &key, &value);) {
    if (key != at.next->key) return false;
    // Most entries are settings of modules.
    if (at.next->kind == Kind::kSame ? (at.next++)->object != value : !same(value, at)) return false;
  }
  return true;
}

void define_snapshot(py::module_& module) {
  py::class_<Snapshot>(module, "Snapshot")
      .def(
          "is_of", [](const Snapshot& then, py::handle roots) { return then.is(roots.ptr(), nullptr); },
          "Whether the roots, and all that they hold, are what they were.")
      .def(
          "has", [](const Snapshot& then, py::handle object) { return then.has(object.ptr()); },
          "Whether an object is one of the modules and tensors.");
  module.def(
      "snapshot",
      [](py::handle roots, py::handle module_type) -> py::object {
        py::list held;
        auto found = Snapshot::of(roots.ptr(), module_type.ptr(), Snapshot::Tensors::kObjects, held);
        return found ? py::make_tuple(py::cast(std::move(*found)), held) : py::object(py::none());
      },
      "What roots hold, lists and tuples of modules among them, and what to keep beside it; None where that could "
      "change"
      " unseen.");
}

}  // namespace mtlk
