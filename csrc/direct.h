// The direct way from Python to a level.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <utility>
#include <vector>

#include "cpu/level/folded_norms.h"
#include "cpu/level/spec.h"

namespace mtlk {

// A call's tensors, and its batch norms by running statistics.
struct LevelCall {
  LevelTensors tensors{};
  RunningNorms norms;
};

// The spec whose ints are given, with the eps of Dice in every layer; null where these have another structure.
std::optional<LevelSpec> read_spec(PyObject* spec_ints, PyObject* dice_eps);

// Whether the arguments, which are those of mtlkernels.expert_mixture, have the structure that is expected.
bool read_level(const LevelSpec& spec, PyObject* inputs, PyObject* weights, PyObject* biases, PyObject* gate_logits,
                PyObject* gate_weights, PyObject* gate_biases, PyObject* norms, PyObject* gate_norms, PyObject* slopes,
                LevelCall& call);

// mtlkernels._C.level, see direct.cpp.
pybind11::object level_from_python(pybind11::handle inputs, pybind11::handle weights, pybind11::handle biases,
                                   pybind11::handle gate_logits, pybind11::handle gate_weights,
                                   pybind11::handle gate_biases, pybind11::handle norms, pybind11::handle gate_norms,
                                   pybind11::handle slopes, pybind11::handle dice_eps, pybind11::handle spec_ints,
                                   bool trains, bool by_name);

// mtlkernels._C.layerwise_level, see direct.cpp.
pybind11::object layerwise_level_from_python(pybind11::handle inputs, pybind11::handle weights, pybind11::handle biases,
                                             pybind11::handle gate_logits, pybind11::handle norms,
                                             pybind11::handle slopes, std::vector<int64_t> ints,
                                             std::vector<double> floats, bool by_name);

// mtlkernels._C.level_tensors, see direct.cpp.
pybind11::object level_tensors_from_python(pybind11::handle inputs, pybind11::handle weights, pybind11::handle biases,
                                           pybind11::handle gate_logits, pybind11::handle gate_weights,
                                           pybind11::handle gate_biases, pybind11::bytes words);

// mtlkernels._C.recoded_level: a spec's lists, once decoded and encoded again. Throws a ValueError for others.
std::pair<std::vector<int64_t>, std::vector<double>> recoded_level(std::vector<int64_t> ints,
                                                                   std::vector<double> floats);

// mtlkernels._C.keep_prepared.
void keep_prepared_from_python(pybind11::handle weights);

}  // namespace mtlk
