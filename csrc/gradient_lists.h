// PCGrad's lists of gradients without the dispatcher.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.gradient_lists, see gradient_lists.cpp.
void define_gradient_lists(pybind11::module_& module);

}  // namespace mtlk
