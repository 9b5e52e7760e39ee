// Calls straight from Python: tensors are taken out of the caller's nested lists once, in C++.
//
// What the arguments are is for Python's checks to say, in the caller's terms: here they either have the structure,
// shapes and dtypes that are expected, or the call is not one for the direct way.

#include "direct.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>

#include "arguments.h"
#include "below_autograd.h"
#include "casts.h"
#include "cpu/level/level.h"
#include "cpu/runtime/check.h"
#include "cpu/runtime/tensors.h"
#include "cpu/simd/activation_codes.h"
#include "level_node.h"
#include "norm_modules.h"
#include "observers.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// As those of arguments.h, each reads one kind of argument, and tells whether it is of the expected structure.

bool read_ints(PyObject* items, std::vector<int64_t>& values) {
  return read_each(items, [&](PyObject* item) {
    if (!PyLong_Check(item)) return false;
    int overflow = 0;
    values.push_back(PyLong_AsLongLongAndOverflow(item, &overflow));
    return overflow == 0;
  });
}

bool read_double(PyObject* object, double& value) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
  value = PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an int beyond all doubles
  return false;
}

// A sequence of tensors, or one that `split` takes apart.
template <typename F>
bool read_joined(PyObject* object, Tensors& tensors, F split) {
  if (!is_tensor(object)) return read_tensors(object, tensors);
  at::Tensor joined;
  if (!read_tensor(object, joined) || has_tangent(joined)) return false;
  const Tensors parts = split(joined);
  tensors.insert(tensors.end(), parts.begin(), parts.end());
  return true;
}

// One entry a layer, each with an item for each expert; None, where it is allowed, stands for as many Nones.
template <typename Item, typename F>
bool read_layers(PyObject* layers, const LevelSpec& spec, bool optional, std::vector<Item>& items, F read) {
  size_t expected = 0;
  const bool fit = read_each(layers, [&](PyObject* layer) {
    expected += spec.experts();
    if (optional && layer == Py_None) return items.resize(expected), true;
    return read(layer) && items.size() == expected;
  });
  return fit && static_cast<int64_t>(expected) == spec.experts() * spec.layers();
}

bool read_stacked(PyObject* layers, const LevelSpec& spec, bool optional, Tensors& tensors) {
  return read_layers(layers, spec, optional, tensors, [&](PyObject* layer) {
    return read_joined(layer, tensors, [](const at::Tensor& stacked) {
      MTLK_CHECK_VALUE(stacked.dim() > 0, "what is stacked must have a dimension for the experts");
      return stacked.unbind(0);
    });
  });
}

// The gates' tensors, from a sequence or from one in which they follow each other along a dimension.
bool read_gates(PyObject* gates, const LevelSpec& spec, int64_t dim, Tensors& tensors) {
  return read_joined(gates, tensors, [&](const at::Tensor& joined) {
    const auto columns = static_cast<int64_t>(spec.gate_experts.size());
    MTLK_CHECK_VALUE(joined.dim() > dim && joined.size(dim) == columns, "joined gates must have ", columns, " columns");
    return joined.split_with_sizes(spec.gate_sizes, dim);
  });
}

// (mean, variance, weight or None, bias or None, eps), or None.
bool read_norm(PyObject* object, NormTensors& norm) {
  if (object == Py_None) return true;
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 5) return false;
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(object, i); };
  return read_tensor(part(0), norm.mean) && read_tensor(part(1), norm.variance) &&
         read_optional(part(2), norm.weight) && read_optional(part(3), norm.bias) && read_double(part(4), norm.eps);
}

bool read_norms(PyObject* items, std::vector<NormTensors>& norms) {
  return read_each(items, [&](PyObject* item) { return read_norm(item, norms.emplace_back()); });
}

// The accumulators of leaves among tensors that will be taken apart.
std::unique_ptr<Accumulators> accumulators_of_joined(std::initializer_list<py::handle> of_layers,
                                                     std::initializer_list<py::handle> of_gates) {
  Tensors joined;
  const auto add = [&](PyObject* object) {
    if (is_tensor(object)) joined.push_back(THPVariable_Unpack(object));
    return true;
  };
  for (const py::handle layers : of_layers) read_each(layers.ptr(), add);
  for (const py::handle gates : of_gates) add(gates.ptr());
  return accumulators_of(joined);
}

// What to hold while joined tensors are taken apart: autograd is told of that only where gradients are wanted, and then
// there are their accumulators.
class Splitting {
 public:
  Splitting(std::initializer_list<py::handle> of_layers, std::initializer_list<py::handle> of_gates) {
    if (records_gradients()) {
      alive_ = accumulators_of_joined(of_layers, of_gates);
    } else {
      below_.emplace();
    }
  }

 private:
  std::unique_ptr<Accumulators> alive_;
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_;
};

bool any_requires_grad(const LevelCall& call) {
  const auto of = [](const Tensors& tensors) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [](const at::Tensor& t) { return t.defined() && t.requires_grad(); });
  };
  const auto of_norms = [](const std::vector<NormTensors>& norms) {
    return std::any_of(norms.begin(), norms.end(), [](const NormTensors& norm) {
      return (norm.weight.defined() && norm.weight.requires_grad()) ||
             (norm.bias.defined() && norm.bias.requires_grad());
    });
  };
  const LevelTensors& tensors = call.tensors;
  return of(tensors.inputs) || of(tensors.weights) || of(tensors.biases) || of(tensors.scales) || of(tensors.shifts) ||
         of(tensors.slopes) || of(tensors.gates) || of(tensors.gate_biases) || of_norms(call.norms.experts) ||
         of_norms(call.norms.gates);
}

// What autocast has products take, in the dtype that it has for them, as the checks in Python cast it. Other dtypes
// stay as they are, and so do norms, slopes and logits. Nothing outside of autocast.
void cast_for_autocast(LevelTensors& tensors) {
  if (!at::autocast::is_autocast_enabled(at::kCPU)) return;
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(at::kCPU);
  std::vector<at::Tensor*> cast;
  const auto add = [&](Tensors& group) {
    for (at::Tensor& tensor : group) cast.push_back(&tensor);
  };
  for (Tensors* group : {&tensors.inputs, &tensors.weights, &tensors.biases}) add(*group);
  if (tensors.linear_gates) {
    add(tensors.gates);
    add(tensors.gate_biases);
  }
  cast_together(cast, dtype);
}

at::Tensor drawn_seed(const at::Generator& generator) {
  return at::randint(std::numeric_limits<int64_t>::max(), {1}, generator, at::kLong);
}

at::Tensor state_of(at::Generator& generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

// Puts a generator back to the state of before a seed was drawn, unless another thread has drawn since, which would
// draw the same again.
void undo_draw(at::Generator& generator, const at::Tensor& before) {
  const py::gil_scoped_release release;
  at::Generator again = at::detail::createCPUGenerator();
  again.set_state(before);
  drawn_seed(again);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  if (at::equal(again.get_state(), generator.get_state())) generator.set_state(before);
}

void hold_memory(LevelCall& call) {
  hold_memory(call.tensors);
  for (std::vector<NormTensors>* of_kind : {&call.norms.experts, &call.norms.gates}) {
    for (NormTensors& norm : *of_kind) {
      for (at::Tensor* part : {&norm.mean, &norm.variance, &norm.weight, &norm.bias}) *part = held(*part);
    }
  }
}

}  // namespace

std::optional<LevelSpec> read_spec(PyObject* spec_ints, PyObject* dice_eps) {
  std::vector<int64_t> ints;
  std::vector<double> floats;
  if (!read_ints(spec_ints, ints)) return std::nullopt;
  if (dice_eps != Py_None) {
    std::vector<double> eps;
    const auto read = [&](PyObject* item) { return read_double(item, eps.emplace_back()) && eps.back() > 0; };
    if (!read_each(dice_eps, read)) return std::nullopt;
    floats.resize(3 * eps.size());
    std::copy(eps.begin(), eps.end(), floats.begin() + static_cast<int64_t>(eps.size()));
  }
  LevelSpec spec(std::move(ints), std::move(floats));
  if (spec.has_norms()) return std::nullopt;  // by the batch's statistics
  return spec;
}

bool read_level(const LevelSpec& spec, PyObject* inputs, PyObject* weights, PyObject* biases, PyObject* gate_logits,
                PyObject* gate_weights, PyObject* gate_biases, PyObject* norms, PyObject* gate_norms, PyObject* slopes,
                LevelCall& call) {
  LevelTensors& tensors = call.tensors;
  if (!read_streams(inputs, tensors.inputs) || !read_stacked(weights, spec, false, tensors.weights)) return false;
  if (biases == Py_None) {
    tensors.biases.resize(tensors.weights.size());
  } else if (!read_stacked(biases, spec, true, tensors.biases)) {
    return false;
  }
  tensors.linear_gates = gate_weights != Py_None;
  if (!read_gates(tensors.linear_gates ? gate_weights : gate_logits, spec, tensors.linear_gates ? 0 : 1,
                  tensors.gates)) {
    return false;
  }
  if (tensors.linear_gates) {
    if (gate_biases == Py_None) {
      tensors.gate_biases.resize(tensors.gates.size());
    } else if (!(is_tensor(gate_biases) ? read_gates(gate_biases, spec, 0, tensors.gate_biases)
                                        : read_tensors<true>(gate_biases, tensors.gate_biases))) {
      return false;
    }
  }
  const auto of_layer = [&](PyObject* layer) { return read_norms(layer, call.norms.experts); };
  const auto slopes_of_layer = [&](PyObject* layer) { return read_tensors(layer, tensors.slopes); };
  // Where an activation has slopes, they are given.
  const auto complete = [&](const int64_t& code) {
    const int64_t layer = &code - spec.activations.begin();
    return has_slopes(static_cast<int>(code)) == tensors.slopes[layer * spec.experts()].defined();
  };
  if (slopes == Py_None ? spec.has_slopes()
                        : !read_layers(slopes, spec, true, tensors.slopes, slopes_of_layer) ||
                              !std::all_of(spec.activations.begin(), spec.activations.end(), complete)) {
    return false;
  }
  return (norms == Py_None || read_layers(norms, spec, true, call.norms.experts, of_layer)) &&
         (gate_norms == Py_None || read_norms(gate_norms, call.norms.gates));
}

void keep_prepared_from_python(py::handle weights) {
  const bool fit = read_each(weights.ptr(), [](PyObject* weight) {
    at::Tensor tensor;
    if (!read_tensor(weight, tensor)) return false;
    declare_weight(tensor);
    return true;
  });
  if (!fit) throw py::value_error("mtlkernels: a list of plain tensors was expected");
}

// The tensors of a level without norms and slopes as operators take them, whose shapes nobody has checked; whether a
// gradient of any is wanted; and their signature. Or None, as above.
py::object level_tensors_from_python(py::handle inputs, py::handle weights, py::handle biases, py::handle gate_logits,
                                     py::handle gate_weights, py::handle gate_biases, py::bytes words) {
  try {
    const py::none none;
    const LevelSpec spec = spec_of_words(std::string_view(words));
    LevelCall call;
    std::optional<Splitting> splitting(std::in_place, std::initializer_list<py::handle>{weights, biases},
                                       std::initializer_list<py::handle>{gate_logits, gate_weights, gate_biases});
    if (spec.has_norms() ||
        !read_level(spec, inputs.ptr(), weights.ptr(), biases.ptr(), gate_logits.ptr(), gate_weights.ptr(),
                    gate_biases.ptr(), none.ptr(), none.ptr(), none.ptr(), call)) {
      return none;
    }
    splitting.reset();
    const bool wanted = records_gradients() && any_requires_grad(call);
    LevelTensors& own = call.tensors;
    py::object known = own.linear_gates ? signature({own.inputs}, {own.weights, own.biases, own.gates, own.gate_biases})
                                        : signature({own.inputs, own.gates}, {own.weights, own.biases});
    return py::make_tuple(
        wrapped_groups<py::list>({&own.inputs, &own.weights, &own.biases, &own.gates, &own.gate_biases}), wanted,
        std::move(known));
  } catch (const Refused&) {
    return py::none();
  }
}

std::pair<std::vector<int64_t>, std::vector<double>> recoded_level(std::vector<int64_t> ints,
                                                                   std::vector<double> floats) {
  return LevelSpec(std::move(ints), std::move(floats)).encoded();
}

// Arguments are as mtlkernels.expert_mixture's, with a level's ints in the place of routing and activation. `norms` and
// `gate_norms`, batch norms by running statistics, are tuples of their tensors and eps. `trains`: whether calls whose
// gradients are wanted are for the direct way too; `by_name`, whether "cpp" was asked for. Returns the outputs, or
// None, where the call is not for the direct way.
py::object level_from_python(py::handle inputs, py::handle weights, py::handle biases, py::handle gate_logits,
                             py::handle gate_weights, py::handle gate_biases, py::handle norms, py::handle gate_norms,
                             py::handle slopes, py::handle dice_eps, py::handle spec_ints, bool trains, bool by_name) {
  try {
    const std::optional<LevelSpec> spec = read_spec(spec_ints.ptr(), dice_eps.ptr());
    LevelCall call;
    std::optional<Splitting> splitting(std::in_place, std::initializer_list<py::handle>{weights, biases},
                                       std::initializer_list<py::handle>{gate_logits, gate_weights, gate_biases});
    if (!spec || !read_level(*spec, inputs.ptr(), weights.ptr(), biases.ptr(), gate_logits.ptr(), gate_weights.ptr(),
                             gate_biases.ptr(), norms.ptr(), gate_norms.ptr(), slopes.ptr(), call)) {
      return py::none();
    }
    splitting.reset();
    const bool wanted = records_gradients() && any_requires_grad(call);
    if (wanted && !(trains && norms.is_none() && gate_norms.is_none() && !spec->stores_inputs())) return py::none();
    cast_for_autocast(call.tensors);
    const LevelTensors given = wanted ? call.tensors : LevelTensors{};
    hold_memory(call);
    Tensors outputs;
    {
      const py::gil_scoped_release release;
      std::optional<c10::impl::ExcludeDispatchKeyGuard> as_it_is(c10::DispatchKey::AutocastCPU);
      if (wanted) {
        LevelResults results = train_level(*spec, call.tensors, {}, true);
        as_it_is.reset();  // hooks on what is saved are the user's
        outputs = with_level_node(*spec, given, {}, std::move(results), by_name);
      } else {
        outputs = serve_level(*spec, call.tensors, call.norms);
      }
    }
    return wrapped_groups<py::tuple>({&outputs});
  } catch (const Refused&) {
    return py::none();
  }
}

// The same of a level whose pre-activations are stored: with norms by the batch, dropout or slopes. `norms` has a list
// of modules, or None, for each layer; `ints` and `floats` are the spec's. Running statistics are brought up to date.
py::object layerwise_level_from_python(py::handle inputs, py::handle weights, py::handle biases, py::handle gate_logits,
                                       py::handle norms, py::handle slopes, std::vector<int64_t> ints,
                                       std::vector<double> floats, bool by_name) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  at::Tensor random_state;  // of before the seed was drawn
  try {
    const py::none none;
    const LevelSpec spec(std::move(ints), std::move(floats));
    LevelCall call;
    NormModules modules;
    std::optional<Splitting> splitting(std::in_place, std::initializer_list<py::handle>{weights, biases},
                                       std::initializer_list<py::handle>{gate_logits});
    if (!read_level(spec, inputs.ptr(), weights.ptr(), biases.ptr(), gate_logits.ptr(), none.ptr(), none.ptr(),
                    none.ptr(), none.ptr(), slopes.ptr(), call) ||
        !modules.read(norms.ptr(), spec, call.tensors)) {
      return none;
    }
    splitting.reset();
    cast_for_autocast(call.tensors);
    const bool wanted = records_gradients() && any_requires_grad(call);
    const bool drops = std::any_of(spec.dropout.begin(), spec.dropout.end(), [](double rate) { return rate > 0; });
    const LevelTensors given = wanted ? call.tensors : LevelTensors{};
    hold_memory(call);
    Tensors outputs;
    {
      const py::gil_scoped_release release;
      const int64_t rows = call.tensors.inputs[0].size(0);
      at::Tensor seed;
      if (drops) {
        random_state = state_of(generator);
        seed = drawn_seed(generator);
      }
      std::optional<c10::impl::ExcludeDispatchKeyGuard> as_it_is(c10::DispatchKey::AutocastCPU);
      LevelResults results = train_level(spec, call.tensors, seed, wanted);
      modules.update(at::TensorList(results.saved).slice(wanted ? spec.layers() : 0), rows);
      as_it_is.reset();
      outputs = wanted ? with_level_node(spec, given, seed, std::move(results), by_name) : std::move(results.outputs);
    }
    return wrapped_groups<py::tuple>({&outputs});
  } catch (const Refused&) {
    if (random_state.defined()) undo_draw(generator, random_state);
    return py::none();
  }
}

}  // namespace mtlk
