// What the host does again and again for calls on a GPU that are alike.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.signature and mtlkernels._C.Recording, see recording.cpp.
void define_recording(pybind11::module_& module);

}  // namespace mtlk
