// SNR-Trans and SNR-Aver past Python and the dispatcher: calls with plain tensors, and their node in autograd's graph.
//
// A Function in Python takes longer than a small call does. This node holds the same tensors, and differentiates in C++
// where nobody looks on and every output has a gradient; any other backward pass it hands to that Function.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.routes, see snr_node.cpp.
void define_snr_node(pybind11::module_& module);

}  // namespace mtlk
