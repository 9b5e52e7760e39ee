// What is watched of a converted module, see mtlkernels/_convert/watched.py, compared object by object.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.watch, see watch.cpp.
void define_watch(pybind11::module_& module);

}  // namespace mtlk
