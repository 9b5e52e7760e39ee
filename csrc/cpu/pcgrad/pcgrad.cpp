// PCGrad's operators on CPUs: the pieces that lists of gradients are cut into.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "common/projection.h"
#include "pcgrad/pcgrad_args.h"
#include "runtime/kernel_tables.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

using GradList = const c10::List<std::optional<at::Tensor>>&;

// Elements of a piece. The Gram matrix adds pieces in their order, so they must not depend on the number of threads.
constexpr int64_t kPiece = 32768;
constexpr int64_t kMostPieces = 4096;
// Results of more bytes are not worth keeping in cache, which they would push everything else out of.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// The gradients of one parameter, walked linearly, and what serves their dtype.
struct Parameter {
  std::vector<int> tasks;  // that have one
  std::vector<at::Tensor> grads;
  std::vector<const void*> addresses;
  const PcgradKernels* kernels = nullptr;
  int64_t elements = 0;
};

// Puts gradients into one order of their elements, as mtlkernels/ops/_layout.py does.
void lay_out_alike(std::vector<at::Tensor>& grads) {
  const auto all = [&](auto holds) { return std::all_of(grads.begin(), grads.end(), holds); };
  if (all([](const at::Tensor& grad) { return grad.is_contiguous(); })) return;
  const at::Tensor first = grads[0];
  if (first.is_non_overlapping_and_dense() &&
      all([&](const at::Tensor& grad) { return grad.strides() == first.strides(); })) {
    return;
  }
  for (at::Tensor& grad : grads) grad = grad.contiguous();
}

std::vector<Parameter> parameters_of(GradList grads, int64_t tasks) {
  TORCH_CHECK_VALUE(tasks > 0 && grads.size() % tasks == 0, "mtlkernels: grads must hold num_tasks = ", tasks,
                    " entries a parameter, got ", grads.size());
  std::vector<Parameter> parameters(grads.size() / tasks);
  for (size_t p = 0; p < parameters.size(); ++p) {
    Parameter& parameter = parameters[p];
    for (int64_t t = 0; t < tasks; ++t) {
      std::optional<at::Tensor> grad = grads.get(p * tasks + t);
      if (!grad) continue;
      check_plain(*grad);
      TORCH_CHECK_VALUE(grad->is_cpu() && grad->layout() == at::kStrided, "mtlkernels: grads[", t, "][", p,
                        "] must be a dense tensor on the CPU");
      const at::Tensor& like = parameter.grads.empty() ? *grad : parameter.grads[0];
      TORCH_CHECK_VALUE(grad->sizes() == like.sizes(), "mtlkernels: grads[", t, "][", p, "] must have shape ",
                        like.sizes(), ", got ", grad->sizes());
      TORCH_CHECK_TYPE(grad->scalar_type() == like.scalar_type(), "mtlkernels: grads[", t, "][", p,
                       "] must have dtype ", like.scalar_type(), ", got ", grad->scalar_type());
      parameter.tasks.push_back(static_cast<int>(t));
      parameter.grads.push_back(*std::move(grad));
    }
    if (parameter.grads.empty()) continue;
    parameter.kernels = &kernels_for<PcgradKernels>(dtype_of(parameter.grads[0]));
    parameter.elements = parameter.grads[0].numel();
    lay_out_alike(parameter.grads);
    for (const at::Tensor& grad : parameter.grads) parameter.addresses.push_back(grad.const_data_ptr());
  }
  return parameters;
}

struct Piece {
  const Parameter* parameter;
  PcgradPiece run;
};

std::vector<Piece> cut(const std::vector<Parameter>& parameters) {
  int64_t total = 0;
  for (const Parameter& parameter : parameters) total += parameter.elements;
  const int64_t size = std::max(kPiece, (total / kMostPieces + 63) / 64 * 64);
  std::vector<Piece> pieces;
  for (const Parameter& parameter : parameters) {
    const int count = static_cast<int>(parameter.tasks.size());
    for (int64_t first = 0; first < parameter.elements; first += size) {
      const int64_t elements = std::min(size, parameter.elements - first);
      pieces.push_back({&parameter, {parameter.addresses.data(), count, first, elements}});
    }
  }
  return pieces;
}

at::Tensor gram(GradList grads, int64_t tasks) {
  const std::vector<Parameter> parameters = parameters_of(grads, tasks);
  const std::vector<Piece> pieces = cut(parameters);
  const int64_t count = static_cast<int64_t>(pieces.size());
  const at::Tensor result = at::zeros({tasks, tasks}, at::kDouble);
  if (count == 0) return result;
  const at::Tensor products = at::empty({count, tasks * tasks}, at::kDouble);
  double* slots = products.mutable_data_ptr<double>();
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  int64_t bytes = 0;
  for (const Piece& piece : pieces) bytes = std::max(bytes, piece.parameter->kernels->gram_bytes(piece.run.count));
  const Scratch scratch(threads, bytes);
  parallel_tasks_on(threads, count, [&](int64_t i, int64_t thread) {
    pieces[i].parameter->kernels->gram(pieces[i].run, slots + i * tasks * tasks, scratch[thread]);
  });
  double* sums = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int>& present = pieces[i].parameter->tasks;
    const double* slot = slots + i * tasks * tasks;
    for (size_t a = 0; a < present.size(); ++a) {
      for (size_t b = a; b < present.size(); ++b) sums[present[a] * tasks + present[b]] += slot[a * present.size() + b];
    }
  }
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = 0; j < i; ++j) sums[i * tasks + j] = sums[j * tasks + i];
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> weights(const at::Tensor& gram, const std::optional<at::Tensor>& order,
                                           bool include_self, std::optional<double> max_norm, bool normalize,
                                           bool project, double eps, bool mean) {
  check_dense("gram", gram, at::kDouble);
  TORCH_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == gram.size(1), "mtlkernels: gram must be a matrix [T, T], got ",
                    gram.sizes());
  const int tasks = static_cast<int>(gram.size(0));
  const at::Tensor from = gram.contiguous();
  const double* products = from.const_data_ptr<double>();
  at::Tensor steps = at::empty({tasks, 0}, at::kLong);
  if (order) {
    check_dense("order", *order, order->scalar_type());
    TORCH_CHECK_VALUE(order->dim() == 2 && order->size(0) == tasks,
                      "mtlkernels: order must be a matrix with a row for each of ", tasks, " tasks, got ",
                      order->sizes());
    steps = order->to(at::kLong).contiguous();
  }
  const int64_t* entries = steps.const_data_ptr<int64_t>();
  const int count = static_cast<int>(steps.size(1));
  const ProjectionOptions options{max_norm.value_or(-1), eps, include_self, normalize, project};
  std::vector<double> scale(tasks);
  projection_scales(products, tasks, options, scale.data(), [](double x) { return std::sqrt(x); });
  const at::Tensor rows = at::empty({tasks, tasks}, gram.options());
  const at::Tensor coefficients = at::zeros({tasks}, gram.options());
  double* row = rows.mutable_data_ptr<double>();
  double* sums = coefficients.mutable_data_ptr<double>();
  for (int i = 0; i < tasks; ++i, row += tasks) {
    project_row(products, scale.data(), tasks, i, entries + int64_t{i} * count, count, options, row);
    for (int j = 0; j < tasks; ++j) sums[j] += row[j];
  }
  for (int j = 0; mean && j < tasks; ++j) sums[j] /= tasks;
  return {rows, coefficients};
}

std::vector<at::Tensor> combine(GradList grads, int64_t tasks, const at::Tensor& coefficients) {
  check_dense("coefficients", coefficients, at::kDouble);
  TORCH_CHECK_VALUE(coefficients.dim() == 1 && coefficients.size(0) == tasks,
                    "mtlkernels: coefficients must have shape [", tasks, "], got ", coefficients.sizes());
  const std::vector<Parameter> parameters = parameters_of(grads, tasks);
  const at::Tensor from = coefficients.contiguous();
  const double* all = from.const_data_ptr<double>();
  std::vector<at::Tensor> results;
  std::vector<void*> outputs;
  std::vector<std::vector<double>> chosen;
  int64_t bytes = 0;
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Parameter& parameter = parameters[p];
    TORCH_CHECK_VALUE(!parameter.grads.empty(),
                      "mtlkernels: grads must hold a gradient for each parameter, got none for ", p);
    const at::Tensor& like = parameter.grads[0];
    results.push_back(pooled(like.sizes(), like.strides(), like.options()));
    outputs.push_back(results.back().mutable_data_ptr());
    bytes += static_cast<int64_t>(results.back().nbytes());
    chosen.emplace_back();
    for (const int task : parameter.tasks) chosen.back().push_back(all[task]);
  }
  const bool past = bytes >= kStreamBytes;
  const std::vector<Piece> pieces = cut(parameters);
  parallel_tasks(at::get_num_threads(), static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const int64_t p = pieces[i].parameter - parameters.data();
    pieces[i].parameter->kernels->combine(pieces[i].run, chosen[p].data(), outputs[p], past);
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("pcgrad_gram", TORCH_FN(gram));
  m.impl("pcgrad_weights", TORCH_FN(weights));
  m.impl("pcgrad_combine", TORCH_FN(combine));
}

}  // namespace mtlk
