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

class Watch {
 public:
  // Of a module that is found to be as `watched` says: what to ask, what Python has to compare at each call, and what
  // has to live as long, in Python, where the garbage collector sees it, as `watched` has to. `words` are those of
  // Words, in their order.
  static py::tuple of(py::handle module, const py::tuple& watched, const py::tuple& words) {
    auto found = std::make_unique<Watch>();
    const auto word = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(words.ptr(), i); };
    const Words all{word(0), word(1), word(2), word(3), word(4), word(5), word(6)};
    py::list rest, held;
    for (const py::handle each : watched) {
      const py::object path = each[py::int_(0)];
      const py::tuple entries = each[py::int_(1)];
      Place place{path.ptr(), {}};
      if (!PyTuple_CheckExact(path.ptr())) {
        const py::object variables = path.attr("values");
        held.append(variables);
        place.path = variables.ptr();
      }
      PyObject* const owner = place.owner(module.ptr());
      py::list others;
      for (const py::handle entry : entries) {
        const py::tuple names = entry[py::int_(0)];
        const py::object value = entry[py::int_(1)];
        if (!owner || !found->take(place, owner, names.ptr(), value.ptr(), all, held)) others.append(entry);
      }
      if (!place.entries.empty()) found->places_.push_back(std::move(place));
      if (!others.empty()) rest.append(py::make_tuple(path, py::tuple(others)));
    }
    return py::make_tuple(py::cast(std::move(found)), py::tuple(rest), held);
  }

  // Whether everything that was looked at is the same object.
  bool still(py::handle module) const {
    for (const Place& place : places_) {
      PyObject* const owner = place.owner(module.ptr());
      if (!owner) return false;
      for (const Entry& entry : place.entries) {
        const Seen* next = entry.seen.data();
        const Found found = look_up(place, owner, entry.names);
        if (!found.certain || found.in_class != entry.in_class || !same(found.object, next)) return false;
      }
    }
    return true;
  }

 private:
  enum class Kind { kSame, kType, kItems, kEntries, kAttributes };
  // Borrowed, from what is held beside it.
  struct Seen {
    Kind kind;
    PyObject* object = nullptr;  // the same one, the type, the keys, or attributes' names; null for nothing
    Py_ssize_t count = 0;
    std::vector<PyObject*> of_class{};  // its way_of_asking, and what it has of attributes' names
  };
  struct Entry {
    PyObject* names;
    bool in_class;
    std::vector<Seen> seen;
  };
  struct Place {
    PyObject* path;  // names of parts, or a dictionary of variables
    std::vector<Entry> entries;

    bool has_variables() const { return PyDict_Check(path); }

    // Borrowed; null where a part is gone.
    PyObject* owner(PyObject* module) const {
      if (has_variables()) return path;
      for (Py_ssize_t i = 0; module && i < PyTuple_GET_SIZE(path); ++i) {
        module = submodule(module, PyTuple_GET_ITEM(path, i));
      }
      return module;
    }
  };
  // What there is under some names, borrowed; null for nothing. `in_class`: the first one is not the instance's.
  // `certain`: all further ones are keys of dictionaries, as Python asks objects in ways of their own.
  struct Found {
    PyObject* object;
    bool in_class, certain;
  };

  static Found look_up(const Place& place, PyObject* owner, PyObject* names) {
    PyObject* const own = place.has_variables() ? owner : dictionary_of(owner);
    PyObject* const name = PyTuple_GET_ITEM(names, 0);
    PyObject* now = own ? entry(own, name) : nullptr;
    if (place.has_variables() && now && PyCell_Check(now)) now = PyCell_GET(now);
    const bool in_class = !now && !place.has_variables();
    if (in_class) now = _PyType_Lookup(Py_TYPE(owner), name);
    bool certain = true;
    for (Py_ssize_t i = 1; now && i < PyTuple_GET_SIZE(names); ++i) {
      certain = certain && PyDict_CheckExact(now);
      now = certain ? entry(now, PyTuple_GET_ITEM(names, i)) : nullptr;
    }
    return {now, in_class, certain};
  }

  bool take(Place& place, PyObject* owner, PyObject* names, PyObject* value, const Words& words, py::list& held) {
    const Found found = look_up(place, owner, names);
    if (!found.certain) return false;
    Entry entry{names, found.in_class, {}};
    if (value == words.absent) {
      // A method of the class may be there in the place of nothing.
      if (found.object && !(found.in_class && PyTuple_GET_SIZE(names) == 1)) return false;
      if (found.object) held.append(py::handle(found.object));
      entry.seen.push_back({Kind::kSame, found.object});
    } else {
      // What a class has may be asked for what it is.
      if (!found.object || (found.in_class && Py_TYPE(found.object)->tp_descr_get)) return false;
      if (!see(found.object, value, words, entry.seen, held)) return false;
    }
    place.entries.push_back(std::move(entry));
    return true;
  }

  // Notes which objects a comparison of `now` with what is kept of it looks at; false where it looks at others.
  static bool see(PyObject* now, PyObject* value, const Words& words, std::vector<Seen>& seen, py::list& held) {
    const bool is_tuple = PyTuple_CheckExact(value);
    const bool is_described = is_tuple && PyTuple_GET_SIZE(value) > 0 && is_of(PyTuple_GET_ITEM(value, 0), words.what);
    PyObject* const what = is_described ? PyTuple_GET_ITEM(value, 0) : words.items;
    PyObject* const inside = is_described ? PyTuple_GET_ITEM(value, 1) : value;
    if (!is_tuple || what == words.object || what == words.itself) {
      if (!is_tuple && !is_fixed(now)) return false;
      const bool of_type = is_tuple && what == words.object;
      PyObject* const same = of_type ? reinterpret_cast<PyObject*>(Py_TYPE(now)) : now;
      held.append(py::handle(same));
      seen.push_back({of_type ? Kind::kType : Kind::kSame, same});
      return true;
    }
    if (what == words.items) return see_items(now, inside, words, seen, held);
    if (what == words.entries) return see_entries(now, PyTuple_GET_ITEM(value, 2), words, seen, held);
    return what == words.with && see_attributes(now, value, words, seen, held);
  }

  // By which a class's instances are asked for their attributes.
  static PyObject* way_of_asking(PyTypeObject* type) {
    static PyObject* const name = interned("__getattribute__");
    return _PyType_Lookup(type, name);
  }

  // Attributes of an object that Python's own way finds in its dictionary.
  static bool see_attributes(PyObject* now, PyObject* value, const Words& words, std::vector<Seen>& seen,
                             py::list& held) {
    PyObject *const names = PyTuple_GET_ITEM(value, 2), *const values = PyTuple_GET_ITEM(value, 3);
    const size_t at = seen.size();
    seen.push_back({Kind::kAttributes, names, PyTuple_GET_SIZE(names)});
    PyObject* const by = way_of_asking(Py_TYPE(now));
    if (by != way_of_asking(&PyBaseObject_Type)) return false;
    seen[at].of_class.push_back(by);
    if (!see(now, PyTuple_GET_ITEM(value, 1), words, seen, held)) return false;
    PyObject* const own = dictionary_of(now);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
      PyObject* const name = PyTuple_GET_ITEM(names, i);
      PyObject* const part = own ? mtlk::entry(own, name) : nullptr;
      PyObject* const of_class = _PyType_Lookup(Py_TYPE(now), name);
      if (!part || (of_class && Py_TYPE(of_class)->tp_descr_set)) return false;
      if (of_class) held.append(py::handle(of_class));
      seen[at].of_class.push_back(of_class);
      if (!see(part, PyTuple_GET_ITEM(values, i), words, seen, held)) return false;
    }
    return true;
  }

  static bool see_items(PyObject* now, PyObject* values, const Words& words, std::vector<Seen>& seen, py::list& held) {
    if (!is_plain_sequence(now)) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(now);
    if (count != PyTuple_GET_SIZE(values)) return false;
    seen.push_back({Kind::kItems, nullptr, count});
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (PySequence_Fast_GET_SIZE(now) != count) return false;
      const py::object part = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(now, i));
      if (!see(part.ptr(), PyTuple_GET_ITEM(values, i), words, seen, held)) return false;
    }
    return true;
  }

  static bool see_entries(PyObject* now, PyObject* values, const Words& words, std::vector<Seen>& seen,
                          py::list& held) {
    if (!PyDict_CheckExact(now) || PyDict_GET_SIZE(now) != PyTuple_GET_SIZE(values)) return false;
    const py::tuple keys(PyTuple_GET_SIZE(values));
    held.append(keys);
    seen.push_back({Kind::kEntries, keys.ptr(), PyTuple_GET_SIZE(values)});
    PyObject *key, *part;
    Py_ssize_t count = 0;
    for (Py_ssize_t place = 0; PyDict_Next(now, &place, &key, &part); ++count) {
      if (count == PyTuple_GET_SIZE(values) || !is_fixed(key)) return false;
      PyTuple_SET_ITEM(keys.ptr(), count, Py_NewRef(key));
      const py::object own = py::reinterpret_borrow<py::object>(part);
      if (!see(own.ptr(), PyTuple_GET_ITEM(values, count), words, seen, held)) return false;
    }
    return count == PyTuple_GET_SIZE(values);
  }

  // What an object's dictionary is asked for may be made then, which may run a collection and what listens to that.
  static bool same(PyObject* now, const Seen*& next) {
    const Seen& seen = *next++;
    if (seen.kind == Kind::kSame) return now == seen.object;
    if (!now) return false;
    switch (seen.kind) {
      case Kind::kSame:
        break;
      case Kind::kType:
        return is_of(now, seen.object);
      case Kind::kItems:
        if (!is_plain_sequence(now) || PySequence_Fast_GET_SIZE(now) != seen.count) return false;
        for (Py_ssize_t i = 0; i < seen.count; ++i) {
          if (PySequence_Fast_GET_SIZE(now) != seen.count) return false;
          const py::object part = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(now, i));
          if (!same(part.ptr(), next)) return false;
        }
        return true;
      case Kind::kEntries: {
        if (!PyDict_CheckExact(now) || PyDict_GET_SIZE(now) != seen.count) return false;
        PyObject *key, *part;
        Py_ssize_t count = 0;
        for (Py_ssize_t place = 0; PyDict_Next(now, &place, &key, &part); ++count) {
          const py::object own = py::reinterpret_borrow<py::object>(part);
          if (key != PyTuple_GET_ITEM(seen.object, count) || !same(own.ptr(), next)) return false;
          if (PyDict_GET_SIZE(now) != seen.count) return false;
        }
        return count == seen.count;
      }
      case Kind::kAttributes: {
        if (!same(now, next) || way_of_asking(Py_TYPE(now)) != seen.of_class[0]) return false;
        PyObject* const own = dictionary_of(now);
        for (Py_ssize_t i = 0; i < seen.count; ++i) {
          PyObject* const name = PyTuple_GET_ITEM(seen.object, i);
          PyObject* const part = own ? mtlk::entry(own, name) : nullptr;
          if (!part || _PyType_Lookup(Py_TYPE(now), name) != seen.of_class[i + 1] || !same(part, next)) return false;
        }
        return true;
      }
    }
    return false;
  }

  std::vector<Place> places_;
};

}  // namespace

void define_watch(py::module_& module) {
  py::class_<Watch>(module, "Watch")
      .def("still", &Watch::still, "Whether everything that was looked at is the same object.");
  module.def("watch", &Watch::of, "What is looked at of a module that is as it was, and two things to keep beside it.");
}

}  // namespace mtlk
