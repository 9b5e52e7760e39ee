// Serving calls straight from Python.
#pragma once

#include <pybind11/pybind11.h>

namespace mtlk {

// mtlkernels._C.serve_expert_mixture, see serve.cpp.
pybind11::object serve_expert_mixture_from_python(
    pybind11::handle inputs, pybind11::handle weights, pybind11::handle biases, pybind11::handle gate_logits,
    pybind11::handle gate_weights, pybind11::handle gate_biases, const pybind11::tuple& expert_inputs,
    const pybind11::tuple& gate_experts, const pybind11::tuple& gate_sizes, pybind11::handle activations,
    pybind11::handle norms, pybind11::handle gate_norms, pybind11::handle slopes, pybind11::handle dice_eps);

// mtlkernels._C.keep_prepared.
void keep_prepared_from_python(pybind11::handle weights);

}  // namespace mtlk
