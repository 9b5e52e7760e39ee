// Calls of a level that serves: what was read of its modules is kept, and each call compares it with what is there,
// which takes a tenth of the time that reading takes. So a parameter that was replaced or moved is never met by what
// was read before it.

#include "kept_level.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/level/kept_level.h"
#include "cpu/runtime/check.h"
#include "direct.h"
#include "snapshot.h"

namespace mtlk {
namespace {

namespace py = pybind11;

bool all_held(const Snapshot& snapshot, const LevelCall& call) {
  const auto held = [&](const at::Tensor& tensor) { return !tensor.defined() || snapshot.holds(tensor); };
  const LevelTensors& tensors = call.tensors;
  for (const Tensors* of_kind : {&tensors.weights, &tensors.biases, &tensors.gates, &tensors.gate_biases}) {
    if (!std::all_of(of_kind->begin(), of_kind->end(), held)) return false;
  }
  for (const std::vector<NormTensors>* of_kind : {&call.norms.experts, &call.norms.gates}) {
    for (const NormTensors& norm : *of_kind) {
      if (!held(norm.mean) || !held(norm.variance) || !held(norm.weight) || !held(norm.bias)) return false;
    }
  }
  return true;
}

class KeptCall {
 public:
  KeptCall(Snapshot snapshot, LevelSpec spec, const LevelCall& call)
      : snapshot_(std::move(snapshot)), level_(std::move(spec), call.tensors, call.norms) {}

  // Arguments are those of mtlkernels._C.level, of a call that it has served, without what kept calls do not have.
  // `roots` hold all modules and tensors from which these came. None where the call is not one to be kept.
  static std::unique_ptr<KeptCall> of(py::handle roots, py::handle module_type, py::handle weights, py::handle biases,
                                      py::handle gate_weights, py::handle gate_biases, py::handle norms,
                                      py::handle gate_norms, py::handle spec_ints) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::optional<Snapshot> snapshot = Snapshot::of(roots.ptr(), module_type.ptr());
    if (!snapshot) return nullptr;
    try {
      const py::none none;
      std::optional<LevelSpec> spec = read_spec(spec_ints.ptr(), none.ptr());
      LevelCall call;
      const py::tuple no_inputs;
      if (!spec || !read_level(*spec, no_inputs.ptr(), weights.ptr(), biases.ptr(), none.ptr(), gate_weights.ptr(),
                               gate_biases.ptr(), norms.ptr(), gate_norms.ptr(), none.ptr(), call)) {
        return nullptr;
      }
      if (!all_held(*snapshot, call)) return nullptr;
      return std::make_unique<KeptCall>(std::move(*snapshot), std::move(*spec), call);
    } catch (const Refused&) {
      return nullptr;
    }
  }

  bool still(py::handle roots) const { return snapshot_.is(roots.ptr()); }

  // The outputs of a call without gradients, after `still`, or None: this is not a call for it.
  py::object serve(py::handle inputs) const {
    Tensors streams;
    const bool fit = THPVariable_Check(inputs.ptr()) ? read_tensor(inputs.ptr(), streams.emplace_back())
                                                     : read_tensors(inputs.ptr(), streams);
    if (!fit || streams.empty()) return py::none();
    try {
      std::optional<Tensors> outputs;
      {
        const py::gil_scoped_release release;
        const at::AutoDispatchBelowADInplaceOrView below;
        outputs = level_.serve(streams);
      }
      return outputs ? wrapped_groups<py::tuple>({&*outputs}) : py::none();
    } catch (const Refused&) {
      return py::none();
    }
  }

 private:
  const Snapshot snapshot_;
  const KeptLevel level_;
};

}  // namespace

void define_kept_level(py::module_& module) {
  py::class_<KeptCall>(module, "KeptCall")
      .def("still", &KeptCall::still, "Whether modules and tensors are what they were.")
      .def("serve", &KeptCall::serve, "The outputs, or None: not its call.");
  module.def("keep_call", &KeptCall::of, "What is kept of a level's call, or None.");
}

}  // namespace mtlk
