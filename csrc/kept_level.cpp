// Calls of a level that serves: what was read of its modules is kept, and each call compares it with what is there,
// which takes a tenth of the time that reading takes. So a parameter that was replaced or moved is never met by what
// was read before it.

#include "kept_level.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/level/kept_level.h"
#include "cpu/runtime/check.h"
#include "direct.h"
#include "modules.h"
#include "observers.h"
#include "snapshot.h"

namespace mtlk {
namespace {

namespace py = pybind11;

class KeptCall {
 public:
  KeptCall(Snapshot snapshot, LevelSpec spec, const LevelCall& call)
      : snapshot_(std::move(snapshot)), level_(std::move(spec), call.tensors, call.norms) {}

  // As keep_call in Python: with what to keep beside it, or None.
  static py::object of(py::handle roots, py::handle module_type, py::handle weights, py::handle biases,
                       py::handle gate_weights, py::handle gate_biases, py::handle norms, py::handle gate_norms,
                       py::handle spec_ints) {
    py::list beside;
    auto snapshot = Snapshot::of(roots.ptr(), module_type.ptr(), Snapshot::Tensors::kPlaces, beside);
    if (!snapshot) return py::none();
    const auto held = [&](const at::Tensor& tensor) { return snapshot->holds(tensor); };
    try {
      auto stored = stored_call(weights, biases, gate_weights, gate_biases, norms, gate_norms, spec_ints);
      if (!stored || !all_parameters(stored->call, held)) return py::none();
      auto call = std::make_unique<KeptCall>(std::move(*snapshot), std::move(stored->spec), stored->call);
      return py::make_tuple(py::cast(std::move(call)), beside);
    } catch (const Refused&) {
      return py::none();
    }
  }

  bool still(py::handle roots) const { return snapshot_.is(roots.ptr(), nullptr); }

  // The outputs of a call without gradients; None: this is not a call for it; False: the roots are not what they were.
  py::object serve(py::handle roots, py::handle inputs) const {
    Tensors streams;
    std::vector<c10::Storage> held;
    if (!read_streams(inputs.ptr(), streams) || streams.empty()) return py::none();
    return snapshot_.is(roots.ptr(), &held) ? served(level_, streams) : py::bool_(false);
  }

 private:
  const Snapshot snapshot_;
  const KeptLevel level_;
};

}  // namespace

std::optional<StoredCall> stored_call(py::handle weights, py::handle biases, py::handle gate_weights,
                                      py::handle gate_biases, py::handle norms, py::handle gate_norms,
                                      py::handle spec_ints) {
  const at::AutoDispatchBelowADInplaceOrView below;  // joined gates are split
  const py::none none;
  const py::tuple no_inputs;
  std::optional<LevelSpec> spec = read_spec(spec_ints.ptr(), none.ptr());
  LevelCall call;
  if (!spec || !read_level(*spec, no_inputs.ptr(), weights.ptr(), biases.ptr(), none.ptr(), gate_weights.ptr(),
                           gate_biases.ptr(), norms.ptr(), gate_norms.ptr(), none.ptr(), call)) {
    return std::nullopt;
  }
  return StoredCall{std::move(*spec), std::move(call)};
}

bool is_plain_call(PyObject* inputs, const Tensors& streams, PyObject* backends, PyObject* dumps) {
  static PyObject *const forced = interned("_forced"), *const folder = interned("folder");
  if (streams.empty()) return false;
  PyObject* const first = is_tensor(inputs) ? inputs : PySequence_Fast_ITEMS(inputs)[0];
  PyObject* const backend = entry(backends, forced);
  const bool by_cpp = backend == Py_None ||
                      (backend && PyUnicode_Check(backend) && PyUnicode_CompareWithASCIIString(backend, "cpp") == 0);
  return is_of(first, reinterpret_cast<PyObject*>(THPVariableClass)) && streams[0].is_cpu() && by_cpp &&
         entry(dumps, folder) == Py_None && !at::autocast::is_autocast_enabled(at::kCPU) && !is_observed(streams);
}

py::object served(const KeptLevel& level, const Tensors& streams) {
  try {
    std::optional<Tensors> outputs;
    {
      const py::gil_scoped_release release;
      const at::AutoDispatchBelowADInplaceOrView below;
      outputs = level.serve(streams);
    }
    return outputs ? wrapped_groups<py::tuple>({&*outputs}) : py::none();
  } catch (const Refused&) {
    return py::none();
  }
}

void define_kept_level(py::module_& module) {
  py::class_<KeptCall>(module, "KeptCall")
      .def("still", &KeptCall::still, "Whether modules and tensors are what they were.")
      .def("serve", &KeptCall::serve, "Outputs, None or False, see there.");
  module.def("keep_call", &KeptCall::of, "What is kept of a level's call, and what to keep beside it; or None.");
}

}  // namespace mtlk
