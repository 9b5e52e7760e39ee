// A level of mtlkernels.nn for serving: what was read of its modules is kept, and each call compares it with what is
// there, which takes a tenth of the time that reading takes. So a parameter that was replaced or moved is never met by
// what was read before it.

#include "kept_level.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/split_with_sizes.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/level/kept_level.h"
#include "cpu/level/level.h"
#include "cpu/runtime/check.h"
#include "modules.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Where a tensor was that was looked at, or none. It is not kept alive, and may be another one by now: what is known of
// it is all that is used.
class Known {
 public:
  explicit Known(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    data_ = tensor.const_data_ptr();
    sizes_ = tensor.sizes().vec();
    strides_ = tensor.strides().vec();
    keys_ = tensor.key_set().raw_repr();
    type_ = tensor.scalar_type();
  }

  bool is(const at::Tensor& now) const {
    if (!now.defined() || type_ == at::ScalarType::Undefined)
      return now.defined() == (type_ != at::ScalarType::Undefined);
    return now.key_set().raw_repr() == keys_ && now.scalar_type() == type_ && now.sizes() == sizes_ &&
           now.strides() == strides_ && now.const_data_ptr() == data_;
  }

 private:
  const void* data_ = nullptr;
  std::vector<int64_t> sizes_, strides_;
  uint64_t keys_ = 0;
  at::ScalarType type_ = at::ScalarType::Undefined;
};

// visit(weight) for the one linear layer that is all gates, or for each of them, until it returns false. Returns false
// then, and where one is not a plain layer without a bias, or does more than that when it is called.
template <typename F>
bool each_gate(PyObject* gates, const ModuleTypes& types, F visit) {
  static PyObject* const kinds[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
  static PyObject *const modules = interned("_modules"), *const forward = interned("forward");
  const auto visit_one = [&](PyObject* gate) {
    const LinearLayer layer(gate, types);
    return layer.weight && !layer.bias && !attribute(gate, forward) &&
           std::none_of(std::begin(kinds), std::end(kinds), [&](PyObject* kind) { return has_hooks(gate, kind); }) &&
           visit(layer.weight);
  };
  if (is_of(gates, types.linear)) return visit_one(gates);
  PyObject* const own = dictionary(gates, modules);
  PyObject* gate;
  for (Py_ssize_t next = 0; own && PyDict_Next(own, &next, nullptr, &gate);) {
    if (!visit_one(gate)) return false;
  }
  return own;
}

// Whether a dropout among experts is in training.
bool any_trains(PyObject* experts) {
  static PyObject *const dropout = interned("dropout"), *const training = interned("training");
  PyObject* expert;
  for (Py_ssize_t next = 0; PyDict_Next(experts, &next, nullptr, &expert);) {
    PyObject* const own = submodule(expert, dropout);
    if (!own || attribute(own, training) != Py_False) return true;
  }
  return false;
}

// What a level is beside its parameters.
struct Parts {
  explicit Parts(PyObject* level) {
    static PyObject *const of_experts = interned("experts"), *const of_gates = interned("gates");
    static PyObject *const modules = interned("_modules"), *const of_routing = interned("routing");
    static PyObject *const of_activation = interned("activation"), *const of_dropout = interned("dropout");
    PyObject* const own = submodule(level, of_experts);
    experts = own ? dictionary(own, modules) : nullptr;
    gates = submodule(level, of_gates);
    routing = attribute(level, of_routing);
    activation = attribute(level, of_activation);
    dropout = attribute(level, of_dropout);
  }
  bool complete() const { return experts && gates && routing && activation && dropout && PyFloat_Check(dropout); }
  // Whether a dropout among the experts drops now.
  bool drops() const { return PyFloat_AS_DOUBLE(dropout) != 0 && any_trains(experts); }

  PyObject *experts, *gates, *routing, *activation, *dropout;  // borrowed
};

// visit(tensor), undefined for none, for weight and bias of each layer of each expert, then for the gates' weights,
// until it returns false. Returns false then, and where the level is not plain.
template <typename F>
bool each_parameter(const Parts& parts, const ModuleTypes& types, F visit) {
  const auto take = [&](PyObject* object) {
    if (!object) return visit(at::Tensor());
    return THPVariable_Check(object) && visit(THPVariable_Unpack(object));
  };
  const auto both = [&](Py_ssize_t, Py_ssize_t, const LinearLayer& layer) {
    return take(layer.weight) && take(layer.bias);
  };
  return each_linear(parts.experts, types, at::GradMode::is_enabled(), both) && each_gate(parts.gates, types, take) &&
         !parts.drops();
}

// From parameters in that order.
LevelTensors tensors_of(const LevelSpec& spec, const Tensors& parameters) {
  const int64_t experts = spec.experts(), layers = spec.layers(), count = 2 * experts * layers;
  MTLK_CHECK_VALUE(static_cast<int64_t>(parameters.size()) > count, "the level has other parameters than expected");
  LevelTensors tensors{};
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t at = 2 * (e * layers + layer);
      tensors.weights.push_back(parameters[at]);
      tensors.biases.push_back(parameters[at + 1]);
    }
  }
  tensors.gates.assign(parameters.begin() + count, parameters.end());
  if (tensors.gates.size() == 1) {
    const at::Tensor joined = tensors.gates[0];
    const auto columns = static_cast<int64_t>(spec.gate_experts.size());
    MTLK_CHECK_VALUE(joined.dim() == 2 && joined.size(0) == columns, "gates must have ", columns, " rows");
    tensors.gates = at::split_with_sizes(joined, spec.gate_sizes);
  }
  tensors.gate_biases.resize(tensors.gates.size());
  tensors.linear_gates = true;
  return tensors;
}

class Kept {
 public:
  // None where the level is not one that is kept.
  static std::unique_ptr<Kept> of(py::handle level, std::vector<int64_t> ints, py::handle expert_type,
                                  py::handle linear_type, py::handle parameter_type) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const ModuleTypes types{expert_type.ptr(), linear_type.ptr(), parameter_type.ptr()};
    const Parts parts(level.ptr());
    Tensors found;
    const auto take = [&](const at::Tensor& tensor) {
      found.push_back(tensor);
      return !tensor.defined() || is_plain(tensor);
    };
    if (!parts.complete() || !each_parameter(parts, types, take)) return nullptr;
    try {
      LevelSpec spec(std::move(ints), {});
      LevelTensors tensors = tensors_of(spec, found);
      return std::unique_ptr<Kept>(new Kept(parts, types, found, std::move(spec), std::move(tensors)));
    } catch (const Refused&) {
      return nullptr;
    }
  }

  // The outputs; None: this is not a call for it; False: the level is no longer what was read.
  py::object serve(py::handle level, py::handle inputs) const {
    bool variable = false;
    if (!still(level.ptr(), variable)) return py::bool_(false);
    Tensors streams;
    const bool fit = THPVariable_Check(inputs.ptr()) ? read_tensor(inputs.ptr(), streams.emplace_back())
                                                     : read_tensors(inputs.ptr(), streams);
    if (!fit || streams.empty()) return py::none();
    for (const at::Tensor& x : streams) variable = variable || x.requires_grad();
    if (variable && at::GradMode::is_enabled()) return py::none();
    try {
      std::optional<Tensors> outputs;
      {
        const py::gil_scoped_release release;
        outputs = level_.serve(streams);
      }
      if (!outputs) outputs = in_another_form(Parts(level.ptr()), std::move(streams));
      return wrapped_groups<py::tuple>({&*outputs});
    } catch (const Refused&) {
      return py::none();
    }
  }

 private:
  Kept(const Parts& parts, const ModuleTypes& types, const Tensors& parameters, LevelSpec spec, LevelTensors tensors)
      : types_(types),
        kept_(py::make_tuple(py::handle(types.expert), py::handle(types.linear), py::handle(types.parameter),
                             py::handle(parts.routing), py::handle(parts.activation), py::handle(parts.dropout))),
        routing_(parts.routing),
        activation_(parts.activation),
        dropout_(parts.dropout),
        known_(parameters.begin(), parameters.end()),
        level_(std::move(spec), std::move(tensors)) {}

  // Whether the level is what was read; `variable` becomes true where a parameter wants gradients.
  bool still(PyObject* level, bool& variable) const {
    const Parts parts(level);
    if (!parts.complete() || parts.routing != routing_ || parts.activation != activation_ ||
        parts.dropout != dropout_) {
      return false;
    }
    auto next = known_.begin();
    const auto same = [&](const at::Tensor& now) {
      if (next == known_.end() || !next->is(now)) return false;
      variable = variable || now.requires_grad();
      ++next;
      return true;
    };
    return each_parameter(parts, types_, same) && next == known_.end();
  }

  // By kernels that want weights in another form than that in which they lie.
  Tensors in_another_form(const Parts& parts, Tensors inputs) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensors parameters;
    each_parameter(parts, types_, [&](const at::Tensor& tensor) { return parameters.push_back(tensor), true; });
    LevelTensors tensors = tensors_of(level_.spec(), parameters);
    tensors.inputs = std::move(inputs);
    const py::gil_scoped_release release;
    return serve_level(level_.spec(), tensors, {});
  }

  const ModuleTypes types_;
  const py::tuple kept_;  // what the pointers beside it stand for
  PyObject *const routing_, *const activation_, *const dropout_;
  const std::vector<Known> known_;
  const KeptLevel level_;
};

}  // namespace

void define_kept_level(py::module_& module) {
  py::class_<Kept>(module, "KeptLevel").def("serve", &Kept::serve, "Outputs, None or False, see kept_level.cpp.");
  module.def("keep_level", &Kept::of, "What is kept of a level for serving, or None.");
}

}  // namespace mtlk
