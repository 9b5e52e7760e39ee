// Operators without gradients, past Python.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.pass_below_autograd, see below_autograd.cpp.
void define_below_autograd(pybind11::module_& module);

}  // namespace mtlk
