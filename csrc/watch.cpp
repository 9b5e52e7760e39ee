// Comparing all that the code of a converted module reads takes Python as long as it takes the kernels to evaluate a
// row. Once it has found everything as it was, the next calls ask for less: that all it looked at are the same objects,
// which takes a tenth of the time. Where one is another, Python compares again.

#include "watch.h"

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

#include "modules.h"
#include "snapshot.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Of Python: the classes and members by which watched.py and values.py tell apart what is kept of a value.
struct Words {
  PyObject *absent, *what, *object, *itself, *with, *items, *entries;
};

// Whether an object is a list or a tuple, perhaps a named one, that has no other way of going over what is in it.
bool is_plain_sequence(PyObject* object) {
  if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) return true;
  if (!PyTuple_Check(object) || Py_TYPE(object)->tp_iter != PyTuple_Type.tp_iter) return false;
  return Py_TYPE(object)->tp_as_sequence->sq_length == PyTuple_Type.tp_as_sequence->sq_length;
}

// Goes over the entries of a dictionary in its own order, which an ordered one keeps elsewhere than others.
class Entries {
 public:
  explicit Entries(PyObject* dictionary) : dictionary_(dictionary) {
    if (PyODict_CheckExact(dictionary)) iterator_ = py::reinterpret_steal<py::object>(PyObject_GetIter(dictionary));
  }
  static bool has(PyObject* object) { return PyDict_CheckExact(object) || PyODict_CheckExact(object); }

  // Borrowed.
  bool next(PyObject*& key, PyObject*& value) {
    if (!iterator_) return PyDict_Next(dictionary_, &place_, &key, &value);
    key_ = py::reinterpret_steal<py::object>(PyIter_Next(iterator_.ptr()));
    if (!key_) return PyErr_Clear(), false;
    key = key_.ptr();
    value = entry(dictionary_, key);
    return value != nullptr;
  }

 private:
  PyObject* const dictionary_;
  Py_ssize_t place_ = 0;
  py::object iterator_, key_;
};

class Watch {
 public:
  // Of a module that is found to be as `watched` says. `words` are those of Words, in their order.
  static std::unique_ptr<Watch> of(py::handle module, const py::tuple& watched, const py::tuple& words) {
    auto found = std::make_unique<Watch>();
    const auto word = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(words.ptr(), i); };
    const Words all{word(0), word(1), word(2), word(3), word(4), word(5), word(6)};
    py::list rest;
    for (const py::handle each : watched) {
      const py::object path = each[py::int_(0)];
      const py::tuple entries = each[py::int_(1)];
      Place place{path, {}};
      if (!PyTuple_CheckExact(path.ptr())) place.path = path.attr("values");
      PyObject* const owner = place.owner(module.ptr());
      py::list others;
      for (const py::handle entry : entries) {
        const py::tuple names = entry[py::int_(0)];
        const py::object value = entry[py::int_(1)];
        if (!owner || !found->take(place, owner, names, value.ptr(), all)) others.append(entry);
      }
      if (!place.entries.empty()) found->places_.push_back(std::move(place));
      if (!others.empty()) rest.append(py::make_tuple(path, py::tuple(others)));
    }
    found->rest_ = py::tuple(rest);
    return found;
  }

  // Whether everything that was looked at is the same object.
  bool still(py::handle module) const {
    for (const Place& place : places_) {
      PyObject* const owner = place.owner(module.ptr());
      if (!owner) return false;
      for (const Entry& entry : place.entries) {
        const Seen* next = entry.seen.data();
        const Found found = look_up(place, owner, entry.names);
        if (found.in_class != entry.in_class || !same(found.object, next)) return false;
      }
    }
    return true;
  }

  // What Python has to compare at each call.
  const py::tuple& rest() const { return rest_; }

 private:
  enum class Kind { kSame, kType, kItems, kEntries, kAttributes };
  struct Seen {
    Kind kind;
    py::object object;  // the same one, the type, or the keys; null for nothing
    Py_ssize_t count = 0;
  };
  struct Entry {
    py::tuple names;
    bool in_class;
    std::vector<Seen> seen;
  };
  struct Place {
    py::object path;  // names of parts, or a dictionary of variables
    std::vector<Entry> entries;

    bool has_variables() const { return PyDict_Check(path.ptr()); }

    // Borrowed; null where a part is gone.
    PyObject* owner(PyObject* module) const {
      if (has_variables()) return path.ptr();
      for (Py_ssize_t i = 0; module && i < PyTuple_GET_SIZE(path.ptr()); ++i) {
        module = submodule(module, PyTuple_GET_ITEM(path.ptr(), i));
      }
      return module;
    }
  };
  // What there is under some names, borrowed; null for nothing. `in_class`: the first one is not the instance's.
  struct Found {
    PyObject* object;
    bool in_class;
  };

  static Found look_up(const Place& place, PyObject* owner, const py::tuple& names) {
    PyObject* const own = place.has_variables() ? owner : dictionary_of(owner);
    PyObject* const name = PyTuple_GET_ITEM(names.ptr(), 0);
    PyObject* now = own ? entry(own, name) : nullptr;
    if (place.has_variables() && now && PyCell_Check(now)) now = PyCell_GET(now);
    const bool in_class = !now && !place.has_variables();
    if (in_class) now = _PyType_Lookup(Py_TYPE(owner), name);
    for (Py_ssize_t i = 1; now && i < PyTuple_GET_SIZE(names.ptr()); ++i) {
      PyObject* const within = PyDict_Check(now) ? now : dictionary_of(now);
      now = within ? entry(within, PyTuple_GET_ITEM(names.ptr(), i)) : nullptr;
    }
    return {now, in_class};
  }

  bool take(Place& place, PyObject* owner, const py::tuple& names, PyObject* value, const Words& words) {
    const Found found = look_up(place, owner, names);
    Entry entry{names, found.in_class, {}};
    if (value == words.absent) {
      // A method of the class may be there in the place of nothing.
      if (found.object && !(found.in_class && names.size() == 1)) return false;
      entry.seen.push_back({Kind::kSame, py::reinterpret_borrow<py::object>(found.object)});
    } else {
      if (!found.object || !is_found(place, owner, names, found.object)) return false;
      if (!see(found.object, value, words, entry.seen)) return false;
    }
    place.entries.push_back(std::move(entry));
    return true;
  }

  // Whether Python finds the same object under these names, which a property may stand in the way of.
  static bool is_found(const Place& place, PyObject* owner, const py::tuple& names, PyObject* found) {
    py::object now;
    for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(names.size()); ++i) {
      PyObject* const name = PyTuple_GET_ITEM(names.ptr(), i);
      const py::tuple first = py::make_tuple(names[0]);
      if (i == 0) {
        const Found one = look_up(place, owner, first);
        now = one.in_class ? attribute_of(reinterpret_cast<PyObject*>(Py_TYPE(owner)), name)
                           : py::reinterpret_borrow<py::object>(one.object);
      } else if (!PyDict_Check(now.ptr())) {
        now = attribute_of(now.ptr(), name);
      } else {
        now = py::reinterpret_borrow<py::object>(mtlk::entry(now.ptr(), name));
      }
      if (!now) return false;
    }
    return now.ptr() == found;
  }

  static py::object attribute_of(PyObject* object, PyObject* name) {
    auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
    if (!found) PyErr_Clear();
    return found;
  }

  // Notes which objects a comparison of `now` with what is kept of it looks at; false where it looks at others.
  static bool see(PyObject* now, PyObject* value, const Words& words, std::vector<Seen>& seen) {
    const bool is_tuple = PyTuple_CheckExact(value);
    const bool is_described = is_tuple && PyTuple_GET_SIZE(value) > 0 && is_of(PyTuple_GET_ITEM(value, 0), words.what);
    if (!is_tuple) {
      if (!is_fixed(now)) return false;
      seen.push_back({Kind::kSame, py::reinterpret_borrow<py::object>(now)});
      return true;
    }
    PyObject* const what = is_described ? PyTuple_GET_ITEM(value, 0) : words.items;
    PyObject* const inside = is_described ? PyTuple_GET_ITEM(value, 1) : value;
    if (what == words.object || what == words.itself) {
      PyObject* const same = what == words.itself ? now : reinterpret_cast<PyObject*>(Py_TYPE(now));
      seen.push_back({what == words.itself ? Kind::kSame : Kind::kType, py::reinterpret_borrow<py::object>(same)});
      return true;
    }
    if (what == words.items) return see_items(now, inside, words, seen);
    if (what == words.entries) return see_entries(now, PyTuple_GET_ITEM(value, 2), words, seen);
    if (what != words.with) return false;
    PyObject *const names = PyTuple_GET_ITEM(value, 2), *const values = PyTuple_GET_ITEM(value, 3);
    seen.push_back({Kind::kAttributes, py::reinterpret_borrow<py::object>(names), PyTuple_GET_SIZE(names)});
    if (!see(now, inside, words, seen)) return false;
    PyObject* const own = dictionary_of(now);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
      PyObject* const name = PyTuple_GET_ITEM(names, i);
      PyObject* const part = own ? mtlk::entry(own, name) : nullptr;
      if (!part || attribute_of(now, name).ptr() != part || !see(part, PyTuple_GET_ITEM(values, i), words, seen)) {
        return false;
      }
    }
    return true;
  }

  static bool see_items(PyObject* now, PyObject* values, const Words& words, std::vector<Seen>& seen) {
    if (!is_plain_sequence(now)) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(now);
    if (count != PyTuple_GET_SIZE(values)) return false;
    seen.push_back({Kind::kItems, {}, count});
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!see(PySequence_Fast_GET_ITEM(now, i), PyTuple_GET_ITEM(values, i), words, seen)) return false;
    }
    return true;
  }

  static bool see_entries(PyObject* now, PyObject* values, const Words& words, std::vector<Seen>& seen) {
    if (!Entries::has(now) || PyDict_GET_SIZE(now) != PyTuple_GET_SIZE(values)) return false;
    py::list keys;
    const size_t at = seen.size();
    seen.push_back({Kind::kEntries, {}, PyDict_GET_SIZE(now)});
    PyObject *key, *part;
    Entries all(now);
    for (Py_ssize_t i = 0; all.next(key, part); ++i) {
      if (!is_fixed(key) || !see(part, PyTuple_GET_ITEM(values, i), words, seen)) return false;
      keys.append(key);
    }
    seen[at].object = py::tuple(keys);
    return static_cast<Py_ssize_t>(keys.size()) == seen[at].count;
  }

  static bool same(PyObject* now, const Seen*& next) {
    const Seen& seen = *next++;
    if (seen.kind == Kind::kSame) return now == seen.object.ptr();
    if (!now) return false;
    switch (seen.kind) {
      case Kind::kSame:
        break;
      case Kind::kType:
        return is_of(now, seen.object.ptr());
      case Kind::kItems:
        if (!is_plain_sequence(now) || PySequence_Fast_GET_SIZE(now) != seen.count) return false;
        for (Py_ssize_t i = 0; i < seen.count; ++i) {
          if (!same(PySequence_Fast_GET_ITEM(now, i), next)) return false;
        }
        return true;
      case Kind::kEntries: {
        if (!Entries::has(now) || PyDict_GET_SIZE(now) != seen.count) return false;
        PyObject *key, *part;
        Entries all(now);
        Py_ssize_t count = 0;
        for (; all.next(key, part); ++count) {
          if (key != PyTuple_GET_ITEM(seen.object.ptr(), count) || !same(part, next)) return false;
        }
        return count == seen.count;
      }
      case Kind::kAttributes: {
        if (!same(now, next)) return false;
        PyObject* const own = dictionary_of(now);
        for (Py_ssize_t i = 0; i < seen.count; ++i) {
          PyObject* const part = own ? mtlk::entry(own, PyTuple_GET_ITEM(seen.object.ptr(), i)) : nullptr;
          if (!part || !same(part, next)) return false;
        }
        return true;
      }
    }
    return false;
  }

  std::vector<Place> places_;
  py::tuple rest_;
};

}  // namespace

void define_watch(py::module_& module) {
  py::class_<Watch>(module, "Watch")
      .def("still", &Watch::still, "Whether everything that was looked at is the same object.")
      .def_property_readonly("rest", &Watch::rest, "What Python has to compare at each call.");
  module.def("watch", &Watch::of, "What is looked at of a module that is as it was.");
}

}  // namespace mtlk
