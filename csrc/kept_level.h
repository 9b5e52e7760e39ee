// Levels of serving copies, see mtlkernels/_prepare.py.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.KeptLevel, see kept_level.cpp.
void define_kept_level(pybind11::module_& module);

}  // namespace mtlk
