// Calls of levels that serve, kept from one to the next, see mtlkernels/ops/level/kept.py.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "cpu/level/kept_level.h"
#include "direct.h"

namespace mtlk {

// The parameters of a call, without inputs.
struct StoredCall {
  LevelSpec spec;
  LevelCall call;
};

// From arguments as mtlkernels._C.level's, of a call that it has served; nothing where they have another structure.
std::optional<StoredCall> stored_call(pybind11::handle weights, pybind11::handle biases, pybind11::handle gate_weights,
                                      pybind11::handle gate_biases, pybind11::handle norms, pybind11::handle gate_norms,
                                      pybind11::handle spec_ints);

// Whether holds(tensor) for all of them.
template <typename F>
bool all_parameters(const LevelCall& call, F holds) {
  const LevelTensors& tensors = call.tensors;
  for (const Tensors* of_kind : {&tensors.weights, &tensors.biases, &tensors.gates, &tensors.gate_biases}) {
    for (const at::Tensor& tensor : *of_kind) {
      if (tensor.defined() && !holds(tensor)) return false;
    }
  }
  for (const std::vector<NormTensors>* of_kind : {&call.norms.experts, &call.norms.gates}) {
    for (const NormTensors& norm : *of_kind) {
      for (const at::Tensor* part : {&norm.mean, &norm.variance, &norm.weight, &norm.bias}) {
        if (part->defined() && !holds(*part)) return false;
      }
    }
  }
  return true;
}

// Whether a call with these inputs may be served by what is kept: as direct_to_cpp in mtlkernels/ops/_call.py, where no
// gradients are recorded. `backends` and `dumps` are the dictionaries of the Python modules that have a say in it.
bool is_plain_call(PyObject* inputs, const Tensors& streams, PyObject* backends, PyObject* dumps);

// The outputs for Python, or None: not a call for it. Python runs meanwhile, in other threads: whoever calls this holds
// the parameters' memory.
pybind11::object served(const KeptLevel& level, const Tensors& streams);

// mtlkernels._C.KeptCall, see kept_level.cpp.
void define_kept_level(pybind11::module_& module);

// mtlkernels._C.KeptLists, see kept_lists.cpp.
void define_kept_lists(pybind11::module_& module);

// mtlkernels._C.KeptTrunk, see kept_trunk.cpp.
void define_kept_trunk(pybind11::module_& module);

}  // namespace mtlk
