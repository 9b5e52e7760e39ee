// Lists of gradients: the pieces that they are cut into.

#include "pcgrad/gradient_lists.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "runtime/check.h"
#include "runtime/kernel_tables.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

// Elements of a piece. The Gram matrix adds pieces in their order, so they must not depend on the number of threads.
constexpr int64_t kPiece = 32768;
constexpr int64_t kMostPieces = 4096;
// Results of more bytes are not worth keeping in cache, which they would push everything else out of.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

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

// Whether a tensor has so many bytes at an address still.
bool is_there(const at::Tensor& tensor, const void* address, int64_t bytes) {
  if (bytes == 0) return true;
  const int64_t before = static_cast<const char*>(address) - static_cast<const char*>(tensor.storage().data());
  return tensor.const_data_ptr() == address && before + bytes <= static_cast<int64_t>(tensor.storage().nbytes());
}

}  // namespace

GradientLists::GradientLists(std::vector<at::Tensor> grads, int64_t tasks) : tasks_(tasks) {
  MTLK_CHECK_VALUE(tasks > 0 && grads.size() % tasks == 0, "grads must hold num_tasks = ", tasks,
                   " entries a parameter, got ", grads.size());
  parameters_.resize(grads.size() / tasks);
  for (size_t p = 0; p < parameters_.size(); ++p) {
    Parameter& parameter = parameters_[p];
    parameter.tasks.reserve(tasks);
    parameter.grads.reserve(tasks);
    for (int64_t t = 0; t < tasks; ++t) {
      at::Tensor& grad = grads[p * tasks + t];
      if (!grad.defined()) continue;
      grad = resolved(grad);
      check_plain(grad);
      MTLK_CHECK_VALUE(grad.is_cpu() && grad.layout() == at::kStrided, "grads[", t, "][", p,
                       "] must be a dense tensor on the CPU");
      const size_t reached = reached_bytes(grad);
      MTLK_CHECK_VALUE(grad.storage().nbytes() >= reached, "grads[", t, "][", p, "] must have ", reached,
                       " bytes of memory, got ", grad.storage().nbytes());
      const at::Tensor& like = parameter.grads.empty() ? grad : parameter.grads[0];
      MTLK_CHECK_VALUE(grad.sizes() == like.sizes(), "grads[", t, "][", p, "] must have shape ", like.sizes(), ", got ",
                       grad.sizes());
      MTLK_CHECK_TYPE(grad.scalar_type() == like.scalar_type(), "grads[", t, "][", p, "] must have dtype ",
                      like.scalar_type(), ", got ", grad.scalar_type());
      parameter.tasks.push_back(static_cast<int>(t));
      parameter.grads.push_back(std::move(grad));
    }
    if (parameter.grads.empty()) continue;
    parameter.kernels = &kernels_for<PcgradKernels>(dtype_of(parameter.grads[0]));
    parameter.elements = parameter.grads[0].numel();
    lay_out_alike(parameter.grads);
    parameter.addresses.reserve(parameter.grads.size());
    for (const at::Tensor& grad : parameter.grads) parameter.addresses.push_back(grad.const_data_ptr());
    parameter.sizes = parameter.grads[0].sizes();
    parameter.strides = parameter.grads[0].strides();
    parameter.dtype = parameter.grads[0].scalar_type();
    parameter.bytes = static_cast<int64_t>(parameter.grads[0].nbytes());
  }
}

std::vector<GradientLists::Piece> GradientLists::cut() const {
  int64_t total = 0;
  for (const Parameter& parameter : parameters_) total += parameter.elements;
  const int64_t size = std::max(kPiece, (total / kMostPieces + 63) / 64 * 64);
  std::vector<Piece> pieces;
  for (const Parameter& parameter : parameters_) {
    const int count = static_cast<int>(parameter.tasks.size());
    for (int i = 0; i < count; ++i) {
      MTLK_CHECK_VALUE(is_there(parameter.grads[i], parameter.addresses[i], parameter.bytes), "grads[",
                       parameter.tasks[i], "][", &parameter - parameters_.data(),
                       "] must keep its memory until gradients are combined");
    }
    for (int64_t first = 0; first < parameter.elements; first += size) {
      const int64_t elements = std::min(size, parameter.elements - first);
      pieces.push_back({&parameter, {parameter.addresses.data(), count, first, elements}});
    }
  }
  return pieces;
}

at::Tensor GradientLists::gram() const {
  const std::vector<Piece> pieces = cut();
  const int64_t count = static_cast<int64_t>(pieces.size());
  const at::Tensor result = at::zeros({tasks_, tasks_}, at::kDouble);
  if (count == 0) return result;
  const at::Tensor products = at::empty({count, tasks_ * tasks_}, at::kDouble);
  double* slots = products.mutable_data_ptr<double>();
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  int64_t bytes = 0;
  for (const Piece& piece : pieces) bytes = std::max(bytes, piece.parameter->kernels->gram_bytes(piece.run.count));
  const Scratch scratch(threads, bytes);
  // Pieces of a thread follow each other, as the kernels fetch what lies behind a piece.
  parallel_runs_on(threads, count, [&](int64_t i, int64_t thread) {
    pieces[i].parameter->kernels->gram(pieces[i].run, slots + i * tasks_ * tasks_, scratch[thread]);
  });
  double* sums = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int>& present = pieces[i].parameter->tasks;
    const double* slot = slots + i * tasks_ * tasks_;
    for (size_t a = 0; a < present.size(); ++a) {
      for (size_t b = a; b < present.size(); ++b)
        sums[present[a] * tasks_ + present[b]] += slot[a * present.size() + b];
    }
  }
  for (int64_t i = 0; i < tasks_; ++i) {
    for (int64_t j = 0; j < i; ++j) sums[i * tasks_ + j] = sums[j * tasks_ + i];
  }
  return result;
}

std::vector<at::Tensor> GradientLists::combine(const at::Tensor& coefficients) const {
  check_dense("coefficients", coefficients, at::kDouble);
  MTLK_CHECK_VALUE(coefficients.dim() == 1 && coefficients.size(0) == tasks_, "coefficients must have shape [", tasks_,
                   "], got ", coefficients.sizes());
  const at::Tensor from = coefficients.contiguous();
  const double* all = from.const_data_ptr<double>();
  std::vector<at::Tensor> results(parameters_.size());
  std::vector<void*> outputs(parameters_.size());
  std::vector<std::vector<double>> chosen(parameters_.size());
  const std::vector<Piece> pieces = cut();
  int64_t bytes = 0;
  for (size_t p = 0; p < parameters_.size(); ++p) {
    const Parameter& parameter = parameters_[p];
    if (parameter.grads.empty()) continue;
    results[p] = pooled(parameter.sizes, parameter.strides, at::device(at::kCPU).dtype(parameter.dtype));
    outputs[p] = results[p].mutable_data_ptr();
    bytes += static_cast<int64_t>(results[p].nbytes());
    for (const int task : parameter.tasks) chosen[p].push_back(all[task]);
  }
  const bool past = bytes >= kStreamBytes;
  const auto count = static_cast<int64_t>(pieces.size());
  parallel_runs_on(at::get_num_threads(), count, [&](int64_t i, int64_t) {
    const int64_t p = pieces[i].parameter - parameters_.data();
    pieces[i].parameter->kernels->combine(pieces[i].run, chosen[p].data(), outputs[p], past);
  });
  return results;
}

}  // namespace mtlk
