// What Python looks for in autograd's graph.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.notable_nodes and first_level, see graph.cpp.
void define_graph(pybind11::module_& module);

}  // namespace mtlk
