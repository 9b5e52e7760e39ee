// Tensors out of Python's lists and back.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cpu/level/spec.h"
#include "observers.h"
#include "recording.h"

namespace mtlk {

// Each reads one kind of argument, and tells whether it is of the expected structure.

// A plain tensor, or a parameter.
inline bool read_tensor(PyObject* object, at::Tensor& tensor) {
  if (!is_tensor(object)) return false;
  tensor = THPVariable_Unpack(object);
  return is_plain(tensor);
}

inline bool read_optional(PyObject* object, at::Tensor& tensor) {
  return object == Py_None || read_tensor(object, tensor);
}

// f(object) for each item of a list or a tuple, until one is not as expected.
template <typename F>
bool read_each(PyObject* items, F f) {
  if (!PyList_Check(items) && !PyTuple_Check(items)) return false;
  PyObject** const entries = PySequence_Fast_ITEMS(items);
  return std::all_of(entries, entries + PySequence_Fast_GET_SIZE(items), f);
}

template <bool Optional = false>
bool read_tensors(PyObject* items, Tensors& tensors) {
  return read_each(items, [&](PyObject* item) {
    at::Tensor& tensor = tensors.emplace_back();
    return Optional ? read_optional(item, tensor) : read_tensor(item, tensor);
  });
}

// A tensor, or a list or a tuple of some.
inline bool read_streams(PyObject* inputs, Tensors& streams) {
  return is_tensor(inputs) ? read_tensor(inputs, streams.emplace_back()) : read_tensors(inputs, streams);
}

inline pybind11::list wrapped(at::TensorList tensors) {
  pybind11::list result;
  for (const at::Tensor& tensor : tensors) result.append(to_python(tensor));
  return result;
}

// A list's tensors, or what a replayed call returns, which then is empty.
inline Tensors unwrapped(pybind11::handle tensors) {
  if (pybind11::isinstance<Results>(tensors)) return std::move(tensors.cast<Results&>().tensors);
  Tensors result;
  for (const pybind11::handle tensor : tensors) {
    if (tensor.is_none()) {
      result.emplace_back();
    } else if (is_tensor(tensor.ptr())) {
      result.push_back(THPVariable_Unpack(tensor.ptr()));
    } else {
      throw pybind11::type_error("mtlkernels: a tensor or None was expected");
    }
  }
  return result;
}

// A list or a tuple of the groups' tensors, None for an undefined one.
template <typename Sequence>
pybind11::object wrapped_groups(std::initializer_list<Tensors*> groups) {
  size_t size = 0, next = 0;
  for (const Tensors* group : groups) size += group->size();
  Sequence result(size);
  for (Tensors* group : groups) {
    for (at::Tensor& tensor : *group) {
      PyObject* const object = to_python(std::move(tensor)).release().ptr();
      if constexpr (std::is_same_v<Sequence, pybind11::list>) {
        PyList_SET_ITEM(result.ptr(), next++, object);
      } else {
        PyTuple_SET_ITEM(result.ptr(), next++, object);
      }
    }
  }
  return result;
}

}  // namespace mtlk
