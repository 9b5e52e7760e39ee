// The operator snr_aver on CPUs.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "runtime/kernel_tables.h"
#include "runtime/parallel.h"
#include "runtime/tensors.h"
#include "snr/snr_call.h"

namespace mtlk {
namespace {

// Outputs of as many bytes are not in the caches when the next operator reads them: past these, on a Zen 4, SNR-Aver
// and relu behind it took 0.66 to 0.91 of the time with 16 to 128 MiB, but 1.1 to 1.35 with 4 and 8.
constexpr int64_t kCachedOutputs = int64_t{16} << 20;

const SnrAverKernels& table_for(const at::Tensor& u) { return kernels_for<SnrAverKernels>(dtype_of(u)); }

SnrMatrices checked(at::TensorList u) {
  TORCH_CHECK_VALUE(!u.empty() && u[0].dim() == 2, "mtlkernels: u must hold at least one matrix");
  SnrMatrices matrices("u", u, u[0].size(0), u[0].scalar_type());
  for (int i = 0; i < matrices.count(); ++i) {
    TORCH_CHECK_VALUE(matrices.widths()[i] == u[0].size(1), "mtlkernels: u[", i, "] must have shape ", u[0].sizes(),
                      " as u[0], got width ", matrices.widths()[i]);
  }
  return matrices;
}

std::vector<at::Tensor> run(const SnrCoding& z, bool transposed, const SnrMatrices& in, const at::Tensor& like) {
  const auto all = [](int, int) { return true; };
  const int outputs = transposed ? z.inputs() : z.outputs();
  SnrSums sums(z, transposed, in, all, like, std::vector<int64_t>(outputs, like.size(1)));
  const SnrAverKernels& table = table_for(like);
  const bool past = outputs * static_cast<int64_t>(like.nbytes()) >= kCachedOutputs;
  parallel_rows(like.size(0), table.sum_bytes(sums.sum()), [&](int64_t, int64_t first, int64_t last, void* scratch) {
    table.sum(sums.sum(), first, last, past, scratch);
  });
  return sums.take();
}

std::vector<at::Tensor> snr_aver_forward(at::TensorList u, const at::Tensor& z) {
  const SnrMatrices in = checked(u);
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
  std::vector<double> partial(divide_up(like.size(0), kTaskRows) * count);
  parallel_rows(like.size(0), table.dots_bytes(call), [&](int64_t task, int64_t first, int64_t last, void* scratch) {
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

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> snr_aver_backward(at::TensorList grad_outputs,
                                                                               at::TensorList u, const at::Tensor& z,
                                                                               bool need_u, bool need_z,
                                                                               bool closed_grad) {
  const SnrMatrices in = checked(u);
  const SnrCoding coding(z, in.count(), u[0].scalar_type());
  const SnrMatrices grads = snr_grad_outputs(grad_outputs, u[0].size(0), u[0].scalar_type(),
                                             std::vector<int64_t>(coding.outputs(), u[0].size(1)));
  std::vector<at::Tensor> grad_u, grad_z;
  if (need_u) grad_u = run(coding, true, grads, u[0]);
  if (need_z) grad_z.push_back(dots(coding, in, grads, u[0], closed_grad).to(z.scalar_type()));
  return {grad_u, grad_z};
}

}  // namespace

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("snr_aver_forward", TORCH_FN(snr_aver_forward));
  m.impl("snr_aver_backward", TORCH_FN(snr_aver_backward));
}

}  // namespace mtlk
