// The linear layers of experts of mtlkernels.nn.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.linears, see linears.cpp.
pybind11::object linears_of_experts(pybind11::handle experts, pybind11::handle expert_type,
                                    pybind11::handle linear_type, pybind11::handle parameter_type,
                                    pybind11::handle dropout_type, bool heard);

}  // namespace mtlk
