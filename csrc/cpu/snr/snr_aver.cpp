// The operator snr_aver on CPUs.

#include <torch/library.h>

#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "snr/snr_call.h"

namespace mtlk {
namespace {

// Rows of a task: enough to hide the cost of taking it, few enough to share out evenly.
constexpr int64_t kTaskRows = 64;

const SnrAverKernels& table_for(const at::Tensor& u) { return kernels().snr_aver[static_cast<int>(dtype_of(u))]; }

// f(task, first row, last row, scratch) for each task.
template <typename F>
void over_rows(int64_t rows, int64_t bytes, F f) {
  const int64_t tasks = (rows + kTaskRows - 1) / kTaskRows;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (tasks == 0) return;
  const Scratch scratch(threads, bytes);
  parallel_tasks_on(threads, tasks, [&](int64_t task, int64_t thread) {
    f(task, task * kTaskRows, std::min(rows, (task + 1) * kTaskRows), scratch[thread]);
  });
}

SnrMatrices checked(const char* name, at::TensorList tensors, const at::Tensor& like) {
  TORCH_CHECK_VALUE(like.dim() == 2, "mtlkernels: u must hold matrices, got ", like.sizes());
  SnrMatrices matrices(name, tensors, like.size(0), like.scalar_type());
  for (int i = 0; i < matrices.count(); ++i) {
    TORCH_CHECK_VALUE(matrices.widths()[i] == like.size(1), "mtlkernels: ", name, "[", i, "] must have shape ",
                      like.sizes(), " as u[0], got width ", matrices.widths()[i]);
  }
  return matrices;
}

std::vector<at::Tensor> run(const SnrCoding& z, bool transposed, const SnrMatrices& in, const at::Tensor& like) {
  SnrSums sums(z, transposed, in, [](int, int) { return true; });
  sums.set_outputs(like.size(0), std::vector<int64_t>(sums.sum().outputs, like.size(1)), like.options());
  const SnrAverKernels& table = table_for(like);
  over_rows(like.size(0), table.sum_bytes(sums.sum()),
            [&](int64_t, int64_t first, int64_t last, void* scratch) { table.sum(sums.sum(), first, last, scratch); });
  return sums.take();
}

std::vector<at::Tensor> forward(at::TensorList u, const at::Tensor& z) {
  TORCH_CHECK_VALUE(!u.empty(), "mtlkernels: u must hold at least one tensor");
  const SnrMatrices in = checked("u", u, u[0]);
  return run(SnrCoding(z, in.count(), u[0].scalar_type()), false, in, u[0]);
}

// <dv_i, u_j> for each pair: partial results of each task, added up in their order.
at::Tensor dots(const SnrCoding& z, const SnrMatrices& u, const SnrMatrices& grads, const at::Tensor& like,
                bool closed_grad) {
  std::vector<SnrPair> pairs;
  for (int i = 0; i < z.outputs(); ++i) {
    for (int j = 0; j < z.inputs(); ++j) {
      if (closed_grad || z.open(i, j)) pairs.push_back({i, j});
    }
  }
  const auto count = static_cast<int64_t>(pairs.size());
  const SnrDots call{like.size(1), u.count(),  grads.count(), u.pointers(), grads.pointers(),
                     u.ld(),       grads.ld(), pairs.data(),  count};
  const SnrAverKernels& table = table_for(like);
  std::vector<double> partial((like.size(0) + kTaskRows - 1) / kTaskRows * count);
  over_rows(like.size(0), table.dots_bytes(call), [&](int64_t task, int64_t first, int64_t last, void* scratch) {
    table.dots(call, first, last, partial.data() + task * count, scratch);
  });
  const at::Tensor result = at::zeros({z.outputs(), z.inputs()}, at::kDouble);
  double* values = result.mutable_data_ptr<double>();
  for (size_t p = 0; p < partial.size(); ++p) {
    const SnrPair& pair = pairs[p % count];
    values[pair.output * z.inputs() + pair.input] += partial[p];
  }
  return result;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> backward(at::TensorList grad_outputs, at::TensorList u,
                                                                      const at::Tensor& z, bool need_u, bool need_z,
                                                                      bool closed_grad) {
  TORCH_CHECK_VALUE(!u.empty(), "mtlkernels: u must hold at least one tensor");
  const SnrMatrices in = checked("u", u, u[0]), grads = checked("grad_outputs", grad_outputs, u[0]);
  const SnrCoding coding(z, in.count(), u[0].scalar_type());
  check_grad_outputs(grad_outputs, coding.outputs());
  std::vector<at::Tensor> grad_u, grad_z;
  if (need_u) grad_u = run(coding, true, grads, u[0]);
  if (need_z) grad_z.push_back(dots(coding, in, grads, u[0], closed_grad).to(z.scalar_type()));
  return {grad_u, grad_z};
}

}  // namespace

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("snr_aver_forward", TORCH_FN(forward));
  m.impl("snr_aver_backward", TORCH_FN(backward));
}

}  // namespace mtlk
