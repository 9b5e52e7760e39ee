// Calls of a level of mtlkernels.nn without norms, all of which goes on in C++: who looks on, what its modules hold,
// and the level. In Python that takes as long as the processor needs to read a tenth of the weights.

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/runtime/check.h"
#include "kept_level.h"
#include "modules.h"
#include "observers.h"
#include "snapshot.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// Whether a module has hooks that run when it is called, or a forward method of its own.
bool has_any_hooks(PyObject* module) {
  static PyObject* const kinds[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
  return has_own_forward(dictionary_of(module)) ||
         std::any_of(std::begin(kinds), std::end(kinds), [&](PyObject* kind) { return has_hooks(module, kind); });
}

// visit(weight) for the one linear layer that is all gates, or for each of them, until it returns false. Returns false
// then, and where one is not a plain layer without a bias, or does more than that when it is called.
template <typename F>
bool each_gate(PyObject* gates, const ModuleTypes& types, F visit) {
  static PyObject* const modules = interned("_modules");
  const auto visit_one = [&](PyObject* gate) {
    const LinearLayer layer(gate, types);
    return layer.weight && !layer.bias && !has_any_hooks(gate) && visit(layer.weight);
  };
  if (is_of(gates, types.linear)) return visit_one(gates);
  PyObject* const own = dictionary(gates, modules);
  PyObject* gate;
  for (Py_ssize_t next = 0; own && PyDict_Next(own, &next, nullptr, &gate);) {
    if (!visit_one(gate)) return false;
  }
  return own;
}

// What a level is beside its parameters, borrowed.
struct Parts {
  explicit Parts(PyObject* level) {
    static PyObject *const of_experts = interned("experts"), *const of_gates = interned("gates");
    static PyObject *const modules = interned("_modules"), *const of_routing = interned("routing");
    PyObject* const own = submodule(level, of_experts);
    experts = own ? dictionary(own, modules) : nullptr;
    gates = submodule(level, of_gates);
    routing = attribute(level, of_routing);
  }
  bool complete() const { return experts && gates && routing; }

  PyObject *experts, *gates, *routing;
};

// visit(tensor), undefined for none, for weight and bias of each layer of each expert, then for the gates' weights,
// until it returns false. Returns the code of the experts' activation, borrowed; null then, and where the level is not
// plain, or has norms or dropout that drops.
template <typename F>
PyObject* each_parameter(const Parts& parts, const ModuleTypes& types, F visit) {
  const auto take = [&](PyObject* object) {
    if (!object) return visit(at::Tensor());
    return is_tensor(object) && visit(THPVariable_Unpack(object));
  };
  InCommon common;
  const auto both = [&](Py_ssize_t, Py_ssize_t, const LinearLayer& layer) {
    return common.bare && take(layer.weight) && take(layer.bias);
  };
  const bool whole = each_linear(parts.experts, types, false, common, both) && each_gate(parts.gates, types, take);
  return whole ? common.activation : nullptr;
}

class KeptTrunk {
 public:
  // `backends` and `dumps` are as in is_plain_call, `global_hooks` those that run with each call of any module. The
  // others are as stored_call's. None where the call is not one to be kept.
  static std::unique_ptr<KeptTrunk> of(py::handle level, py::handle backends, py::handle dumps, py::handle global_hooks,
                                       py::handle expert_type, py::handle linear_type, py::handle parameter_type,
                                       py::handle dropout_type, py::handle weights, py::handle biases,
                                       py::handle gate_weights, py::handle spec_ints) {
    const ModuleTypes types{expert_type.ptr(), linear_type.ptr(), parameter_type.ptr(), dropout_type.ptr()};
    const Parts parts(level.ptr());
    KnownTensors known;
    if (!parts.complete()) return nullptr;
    PyObject* const activation = each_parameter(parts, types, [&](const at::Tensor& t) { return known.take(t); });
    if (!activation) return nullptr;
    const py::none none;
    try {
      auto stored = stored_call(weights, biases, gate_weights, none, none, none, spec_ints);
      if (!stored || !all_parameters(stored->call, [&](const at::Tensor& t) { return known.holds(t); })) return nullptr;
      py::object kept = py::make_tuple(backends, dumps, expert_type, linear_type, parameter_type, dropout_type,
                                       py::handle(parts.routing), py::handle(activation), global_hooks);
      return std::unique_ptr<KeptTrunk>(new KeptTrunk(std::move(kept), std::move(known), std::move(*stored)));
    } catch (const Refused&) {
      return nullptr;
    }
  }

  // The outputs; None: this is not a call for it; False: the level is no longer what it was. `uncalled`: the level was
  // not called as a module is, and so its hooks have not run.
  py::object serve(py::handle level, py::handle inputs, bool uncalled) const {
    if (uncalled && does_more_when_called(level.ptr())) return py::none();
    Tensors streams;
    std::vector<c10::Storage> held;
    if (!read_streams(inputs.ptr(), streams) || !is_plain_call(inputs.ptr(), streams, item(0), item(1))) {
      return py::none();
    }
    return still(level.ptr(), held) ? served(level_, streams) : py::bool_(false);
  }

 private:
  KeptTrunk(py::object kept, KnownTensors known, StoredCall stored)
      : kept_(std::move(kept)),
        types_{item(2), item(3), item(4), item(5)},
        known_(std::move(known)),
        level_(std::move(stored.spec), stored.call.tensors, stored.call.norms) {}

  PyObject* item(Py_ssize_t i) const { return PyTuple_GET_ITEM(kept_.ptr(), i); }

  bool does_more_when_called(PyObject* level) const {
    PyObject* const hooks = item(8);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(hooks); ++i) {
      if (PyDict_Size(PyTuple_GET_ITEM(hooks, i)) != 0) return true;
    }
    return has_any_hooks(level);
  }

  // Whether the level is what it was; the memory of its parameters is then `held`.
  bool still(PyObject* level, std::vector<c10::Storage>& held) const {
    const Parts parts(level);
    if (!parts.complete() || parts.routing != item(6)) return false;
    KnownTensors::Comparison known(known_, held);
    PyObject* const activation = each_parameter(parts, types_, [&](const at::Tensor& now) { return known.next(now); });
    return activation == item(7) && known.complete();
  }

  const py::object kept_;  // in the order of `of`
  const ModuleTypes types_;
  const KnownTensors known_;
  const KeptLevel level_;
};

}  // namespace

void define_kept_trunk(py::module_& module) {
  py::class_<KeptTrunk>(module, "KeptTrunk").def("serve", &KeptTrunk::serve, "Outputs, None or False, see there.");
  module.def("keep_trunk", &KeptTrunk::of, "What is kept of a call of a trunk's level, or None.");
}

}  // namespace mtlk
