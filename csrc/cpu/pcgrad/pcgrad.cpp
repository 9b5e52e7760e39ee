// PCGrad's operators on CPUs.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "common/projection.h"
#include "pcgrad/gradient_lists.h"
#include "runtime/check.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

using GradList = const c10::List<std::optional<at::Tensor>>&;

GradientLists read(GradList grads, int64_t tasks) {
  std::vector<at::Tensor> found;
  found.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) found.push_back(grads.get(i).value_or(at::Tensor()));
  return GradientLists(std::move(found), tasks);
}

at::Tensor gram(GradList grads, int64_t tasks) { return read(grads, tasks).gram(); }

std::tuple<at::Tensor, at::Tensor> weights(const at::Tensor& gram, const std::optional<at::Tensor>& order,
                                           bool include_self, std::optional<double> max_norm, bool normalize,
                                           bool project, double eps, bool mean) {
  check_dense("gram", gram, at::kDouble);
  MTLK_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == gram.size(1), "gram must be a matrix [T, T], got ", gram.sizes());
  const int tasks = static_cast<int>(gram.size(0));
  const at::Tensor from = gram.contiguous();
  const double* products = from.const_data_ptr<double>();
  at::Tensor steps = at::empty({tasks, 0}, at::kLong);
  if (order) {
    check_dense("order", *order, order->scalar_type());
    MTLK_CHECK_VALUE(order->dim() == 2 && order->size(0) == tasks, "order must be a matrix with a row for each of ",
                     tasks, " tasks, got ", order->sizes());
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
  std::vector<at::Tensor> results = read(grads, tasks).combine(coefficients);
  for (size_t p = 0; p < results.size(); ++p) {
    MTLK_CHECK_VALUE(results[p].defined(), "grads must hold a gradient for each parameter, got none for ", p);
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("pcgrad_gram", TORCH_FN(gram));
  m.impl("pcgrad_weights", TORCH_FN(weights));
  m.impl("pcgrad_combine", TORCH_FN(combine));
}

}  // namespace mtlk
