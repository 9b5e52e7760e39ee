#include "norm_modules.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "arguments.h"
#include "cpu/level/level_args.h"
#include "cpu/runtime/tensors.h"
#include "modules.h"

namespace mtlk {
namespace {

namespace py = pybind11;

struct NormTypes {
  PyObject *batch_norm, *layer_norm;
};

const NormTypes& norm_types() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<NormTypes> types;
  return types
      .call_once_and_store_result([] {
        const py::module_ nn = py::module_::import("torch.nn");
        py::object batch_norm = nn.attr("BatchNorm1d"), layer_norm = nn.attr("LayerNorm");
        return NormTypes{batch_norm.release().ptr(), layer_norm.release().ptr()};  // for good
      })
      .get_stored();
}

// A float or an int, but no bool.
bool read_number(PyObject* object, double& value) {
  if (!object || !(PyFloat_CheckExact(object) || PyLong_CheckExact(object))) return false;
  value = PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool is_int(PyObject* object, int64_t expected) {
  if (!object || !PyLong_CheckExact(object)) return false;
  int overflow = 0;
  return PyLong_AsLongLongAndOverflow(object, &overflow) == expected && overflow == 0;
}

// Whether a norm, by its dictionary, normalizes as many features.
bool has_width(PyObject* own, bool batch, int64_t width) {
  static PyObject *const features = interned("num_features"), *const shape = interned("normalized_shape");
  if (batch) return is_int(entry(own, features), width);
  PyObject* const sizes = entry(own, shape);
  return sizes && PyTuple_Check(sizes) && PyTuple_GET_SIZE(sizes) == 1 && is_int(PyTuple_GET_ITEM(sizes, 0), width);
}

// Whether statistics may lie beside inputs of a dtype.
bool goes_with(const at::Tensor& statistics, at::ScalarType dtype) {
  return statistics.scalar_type() == dtype || (statistics.scalar_type() == at::kFloat && dtype != at::kDouble);
}

// Memory to write to past the dispatcher.
bool is_writable(const at::Tensor& tensor, int64_t dim, int64_t numel) {
  return tensor.dim() == dim && tensor.numel() == numel && tensor.is_contiguous() && tensor.is_cpu() &&
         !tensor.requires_grad() && !tensor.is_inference() && tensor.storage().nbytes() >= reached_bytes(tensor);
}

// As PyTorch's batch norm averages them: what is infinite stays so, and what is narrow is rounded once.
template <typename S, typename T>
void average(S* running, int64_t count, const T* values, double scale, double weight) {
  for (int64_t i = 0; i < count; ++i) {
    const double next = weight * (values[i] * scale) + (1 - weight) * static_cast<T>(running[i]);
    running[i] = static_cast<S>(static_cast<T>(next));
  }
}

template <typename T>
void average(const at::Tensor& running, const T* values, double scale, double weight) {
  const auto as = [&](auto* own) { average(own, running.numel(), values, scale, weight); };
  switch (running.scalar_type()) {
    case at::kBFloat16:
      return as(running.mutable_data_ptr<at::BFloat16>());
    case at::kHalf:
      return as(running.mutable_data_ptr<at::Half>());
    default:
      return as(running.mutable_data_ptr<T>());
  }
}

}  // namespace

bool NormModules::read(PyObject* norms, const LevelSpec& spec, LevelTensors& tensors) {
  if (!spec.has_norms()) return norms == Py_None;
  if (tensors.inputs.empty()) return false;
  int64_t layer = 0;
  const bool fit = read_each(norms, [&](PyObject* modules) {
    if (layer == spec.layers()) return false;
    const int64_t own = layer++;
    if (spec.norms[own] == kNoNorm) {
      tensors.scales.resize(layer * spec.experts());
      tensors.shifts.resize(layer * spec.experts());
      return modules == Py_None;
    }
    const bool read = read_each(modules, [&](PyObject* module) { return read_module(module, spec, own, tensors); });
    ++norms_;
    return read && static_cast<int64_t>(tensors.scales.size()) == layer * spec.experts();
  });
  return fit && layer == spec.layers();
}

bool NormModules::read_module(PyObject* module, const LevelSpec& spec, int64_t layer, LevelTensors& tensors) {
  static PyObject *const of_eps = interned("eps"), *const parameters = interned("_parameters");
  static PyObject *const of_weight = interned("weight"), *const of_bias = interned("bias");
  const bool batch = spec.norms[layer] == kBatchNorm;
  const size_t number = tensors.scales.size();
  if (!is_of(module, batch ? norm_types().batch_norm : norm_types().layer_norm) || number >= tensors.weights.size()) {
    return false;
  }
  PyObject* const own = dictionary_of(module);
  const at::Tensor& of_layer = tensors.weights[layer * spec.experts()];
  double eps = 0;
  if (!own || of_layer.dim() != 2 || !has_width(own, batch, of_layer.size(0)) ||
      !read_number(entry(own, of_eps), eps) || eps != spec.eps[layer]) {
    return false;
  }
  PyObject* const given = inner_dictionary(own, parameters);
  PyObject *const weight = given ? entry(given, of_weight) : nullptr, *const bias =
                                                                          given ? entry(given, of_bias) : nullptr;
  if (!weight || !bias || !read_optional(weight, tensors.scales.emplace_back()) ||
      !read_optional(bias, tensors.shifts.emplace_back())) {
    return false;
  }
  if (!batch) return true;
  if (!(eps >= 0) || std::find(batch_norms_.begin(), batch_norms_.end(), module) != batch_norms_.end()) return false;
  batch_norms_.push_back(module);
  const at::Tensor& x = tensors.inputs[0];
  return x.dim() == 2 && x.size(0) >= 2 &&
         read_running(own, of_layer.size(0), x.scalar_type(), {{}, {}, {}, 0, norms_, number % spec.experts()});
}

bool NormModules::read_running(PyObject* own, int64_t width, at::ScalarType dtype, Running running) {
  static PyObject *const of_mean = interned("running_mean"), *const of_variance = interned("running_var");
  static PyObject *const of_count = interned("num_batches_tracked"), *const of_momentum = interned("momentum");
  static PyObject *const training = interned("training"), *const tracks = interned("track_running_stats");
  static PyObject* const buffers = interned("_buffers");
  PyObject* const kept = inner_dictionary(own, buffers);
  PyObject *const trains = entry(own, training), *const tracked = entry(own, tracks);
  if (!kept || !trains || !PyBool_Check(trains) || !tracked || !PyBool_Check(tracked)) return false;
  PyObject *const mean = entry(kept, of_mean), *const variance = entry(kept, of_variance);
  PyObject* const count = entry(kept, of_count);
  if (!mean || !variance || !count) return false;
  if (trains == Py_True && tracked == Py_False) return true;
  if (mean == Py_None || variance == Py_None) return mean == variance;
  PyObject* const momentum = entry(own, of_momentum);
  if (momentum == Py_None) {
    running.momentum = std::numeric_limits<double>::quiet_NaN();
  } else if (!read_number(momentum, running.momentum) || std::isnan(running.momentum)) {
    return false;
  }
  const bool fit =
      trains == Py_True && read_tensor(mean, running.mean) && read_tensor(variance, running.variance) &&
      goes_with(running.mean, dtype) && is_writable(running.mean, 1, width) && goes_with(running.variance, dtype) &&
      is_writable(running.variance, 1, width) && read_optional(count, running.count) &&
      (!running.count.defined() || (running.count.scalar_type() == at::kLong && is_writable(running.count, 0, 1)));
  if (fit) running_.push_back(std::move(running));
  return fit;
}

void NormModules::update(at::TensorList statistics, int64_t rows) const {
  if (running_.empty()) return;
  statistics[0].scalar_type() == at::kDouble ? update_as<double>(statistics, rows) : update_as<float>(statistics, rows);
}

template <typename T>
void NormModules::update_as(at::TensorList statistics, int64_t rows) const {
  const double unbiased = static_cast<double>(rows) / static_cast<double>(rows - 1);
  for (const Running& own : running_) {
    const auto of_batch = [&](size_t i) {
      return statistics[i].const_data_ptr<T>() + own.expert * static_cast<size_t>(statistics[i].size(1));
    };
    double weight = own.momentum;
    if (own.count.defined()) {
      const int64_t batches = ++*own.count.mutable_data_ptr<int64_t>();
      own.count.unsafeGetTensorImpl()->bump_version();
      if (std::isnan(weight)) weight = 1 / static_cast<double>(batches);
    }
    if (std::isnan(weight)) continue;
    average(own.mean, of_batch(own.norm), 1, weight);
    average(own.variance, of_batch(norms_ + own.norm), unbiased, weight);
  }
}

}  // namespace mtlk
