// Serving calls straight from Python: tensors are taken out of the caller's nested lists once, in C++.

#include "serve.h"

#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>

#include "cpu/gemm/kept_weights.h"
#include "cpu/level/expert_mixture.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// A plain tensor, or a parameter: one that nothing but its memory stands behind.
at::Tensor tensor_of(PyObject* object) {
  if (!THPVariable_Check(object)) throw std::invalid_argument("a tensor was expected");
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) throw std::invalid_argument("a plain tensor was expected");
  return tensor;
}

std::vector<int64_t> integers_of(py::handle tuple) {
  std::vector<int64_t> values;
  for (const py::handle item : tuple) values.push_back(item.cast<int64_t>());
  return values;
}

// f(object) for each item of a list or a tuple.
template <typename F>
void for_each(PyObject* items, F f) {
  if (!PyList_Check(items) && !PyTuple_Check(items)) throw std::invalid_argument("a list or a tuple was expected");
  PyObject** entries = PySequence_Fast_ITEMS(items);
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); ++i) f(entries[i]);
}

void append(PyObject* items, std::vector<at::Tensor>& tensors) {
  for_each(items, [&](PyObject* item) { tensors.push_back(tensor_of(item)); });
}

// A layer's tensors, from a sequence or from one that is stacked.
void append_layer(PyObject* layer, std::vector<at::Tensor>& tensors) {
  if (THPVariable_Check(layer)) {
    const std::vector<at::Tensor> parts = tensor_of(layer).unbind(0);
    tensors.insert(tensors.end(), parts.begin(), parts.end());
  } else {
    append(layer, tensors);
  }
}

// The gates' tensors, from a sequence or from one in which they follow each other.
void append_gates(PyObject* gates, at::IntArrayRef sizes, std::vector<at::Tensor>& tensors) {
  if (THPVariable_Check(gates)) {
    tensors = tensor_of(gates).split_with_sizes(sizes, 0);
  } else {
    append(gates, tensors);
  }
}

at::Tensor optional_tensor_of(PyObject* object) { return object == Py_None ? at::Tensor() : tensor_of(object); }

// (mean, variance, weight or None, bias or None, eps), or None.
NormTensors norm_of(PyObject* object) {
  if (object == Py_None) return {};
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 5) throw std::invalid_argument("five parts were expected");
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(object, i); };
  return {tensor_of(part(0)), tensor_of(part(1)), optional_tensor_of(part(2)), optional_tensor_of(part(3)),
          py::handle(part(4)).cast<double>()};
}

void check_layers(const std::vector<at::Tensor>& tensors, size_t experts, size_t layers) {
  if (tensors.size() != experts * layers) throw std::invalid_argument("a tensor an expert and a layer was expected");
}

}  // namespace

void keep_prepared_from_python(py::handle weights) {
  for_each(weights.ptr(), [](PyObject* weight) { KeptWeights::instance().declare(tensor_of(weight)); });
}

py::object serve_expert_mixture_from_python(py::handle inputs, py::handle weights, py::handle biases,
                                            py::handle gate_logits, py::handle gate_weights, py::handle gate_biases,
                                            const py::tuple& expert_inputs, const py::tuple& gate_experts,
                                            const py::tuple& gate_sizes, py::handle activations, py::handle norms,
                                            py::handle gate_norms, py::handle slopes, py::handle dice_eps) {
  ServeArgs args;
  args.expert_inputs = integers_of(expert_inputs);
  args.gate_experts = integers_of(gate_experts);
  args.gate_sizes = integers_of(gate_sizes);
  args.activations = integers_of(activations);
  const size_t experts = args.expert_inputs.size(), layers = args.activations.size();
  if (experts == 0) throw std::invalid_argument("an expert was expected");
  if (THPVariable_Check(inputs.ptr())) {
    args.inputs.push_back(tensor_of(inputs.ptr()));
    args.expert_inputs.assign(experts, 0);
  } else {
    append(inputs.ptr(), args.inputs);
  }
  for_each(weights.ptr(), [&](PyObject* layer) {
    append_layer(layer, args.weights);
    check_layers(args.weights, experts, args.weights.size() / experts);
  });
  check_layers(args.weights, experts, layers);
  if (biases.is_none()) {
    args.biases.resize(args.weights.size());
  } else {
    for_each(biases.ptr(), [&](PyObject* layer) {
      if (layer == Py_None) {
        args.biases.resize(args.biases.size() + experts);
      } else {
        append_layer(layer, args.biases);
      }
      check_layers(args.biases, experts, args.biases.size() / experts);
    });
  }
  if (!gate_weights.is_none()) {
    append_gates(gate_weights.ptr(), args.gate_sizes, args.gate_weights);
    if (gate_biases.is_none()) {
      args.gate_biases.resize(args.gate_weights.size());
    } else if (THPVariable_Check(gate_biases.ptr())) {
      append_gates(gate_biases.ptr(), args.gate_sizes, args.gate_biases);
    } else {
      for_each(gate_biases.ptr(), [&](PyObject* bias) { args.gate_biases.push_back(optional_tensor_of(bias)); });
    }
  } else if (THPVariable_Check(gate_logits.ptr())) {
    args.gate_logits = tensor_of(gate_logits.ptr()).split_with_sizes(args.gate_sizes, 1);
  } else {
    append(gate_logits.ptr(), args.gate_logits);
  }
  if (!norms.is_none()) {
    for_each(norms.ptr(), [&](PyObject* layer) {
      if (layer == Py_None) return args.norms.resize(args.norms.size() + experts);
      for_each(layer, [&](PyObject* norm) { args.norms.push_back(norm_of(norm)); });
    });
  }
  if (!gate_norms.is_none()) {
    for_each(gate_norms.ptr(), [&](PyObject* norm) { args.gate_norms.push_back(norm_of(norm)); });
  }
  if (!slopes.is_none()) {
    for_each(slopes.ptr(), [&](PyObject* layer) {
      if (layer == Py_None) return args.slopes.resize(args.slopes.size() + experts);
      append(layer, args.slopes);
    });
    for (const py::handle eps : dice_eps) args.dice_eps.push_back(eps.cast<double>());
  }
  std::vector<at::Tensor> outputs;
  {
    const py::gil_scoped_release release;
    outputs = serve_expert_mixture(args);
  }
  py::tuple result(outputs.size());
  for (size_t k = 0; k < outputs.size(); ++k) {
    PyObject* const wrapped = THPVariable_Wrap(std::move(outputs[k]));
    if (!wrapped) throw py::error_already_set();
    PyTuple_SET_ITEM(result.ptr(), k, wrapped);
  }
  return result;
}

}  // namespace mtlk
