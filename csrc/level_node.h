// A level in autograd's graph without Python: the node of a call by the direct way.
//
// A Function in Python takes longer than a small level, and longer with each tensor that it is applied to. This one
// holds the same tensors, and runs the level's backward operator where nobody looks on; whatever else a backward pass
// may be, one that is differentiated again, traced, or of several losses at once, it hands to that Function in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/function.h>

#include <string_view>

#include "cpu/level/level.h"

namespace mtlk {

// The spec of 64-bit ints that lie side by side, without floats.
LevelSpec spec_of_words(std::string_view words);

// The outputs of a call whose gradients are wanted, with a node of these tensors, which the caller gave. `seed`: of
// what was dropped, or undefined. `by_name`: "cpp" was asked for.
Tensors with_level_node(const LevelSpec& spec, const LevelTensors& tensors, const at::Tensor& seed,
                        LevelResults results, bool by_name);

bool is_level_node(torch::autograd::Node* node);

// mtlkernels._C.recorded_level, LevelContext and level_context, see level_node.cpp.
void define_level_node(pybind11::module_& module);

}  // namespace mtlk
