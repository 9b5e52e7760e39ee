// The operator snr_aver on CPUs.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#include "runtime/check.h"
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
  MTLK_CHECK_VALUE(!u.empty() && u[0].dim() == 2, "u must hold at least one matrix");
  SnrMatrices matrices("u", u, u[0].size(0), u[0].scalar_type());
  for (int i = 0; i < matrices.count(); ++i) {
    MTLK_CHECK_VALUE(matrices.widths()[i] == u[0].size(1), "u[", i, "] must have shape ", u[0].sizes(),
                     " as u[0], got width ", matrices.widths()[i]);
  }
  return matrices;
}

// Sums of one direction, and whether they go past the caches.
class Sums {
 public:
  Sums(const SnrCoding& z, bool transposed, const SnrMatrices& in, const at::Tensor& like)
      : sums_(
            z, transposed, in, [](int, int) { return true; }, like, widths(z, transposed, like)),
        past_(sums_.sum().outputs * static_cast<int64_t>(like.nbytes()) >= kCachedOutputs) {}

  SnrAverWork work() const { return {&sums_.sum(), past_, nullptr}; }
  std::vector<at::Tensor> take() { return sums_.take(); }

 private:
  static std::vector<int64_t> widths(const SnrCoding& z, bool transposed, const at::Tensor& like) {
    return std::vector<int64_t>(transposed ? z.inputs() : z.outputs(), like.size(1));
  }

  SnrSums sums_;
  const bool past_;
};

// <dv_i, u_j> for each pair that is wanted: partial results of each task, added up in their order.
class Dots {
 public:
  Dots(const SnrCoding& z, const SnrMatrices& u, const SnrMatrices& grads, const at::Tensor& like, bool closed_grad)
      : pairs_(pairs(z, closed_grad)),
        count_(static_cast<int64_t>(pairs_.size())),
        call_{like.size(1), u.count(),  grads.count(), u.pointers(), grads.pointers(),
              u.ld(),       grads.ld(), pairs_.data(), count_},
        partial_(divide_up(like.size(0), kTaskRows) * count_) {}

  const SnrDots* call() const { return &call_; }
  double* results(int64_t task) { return partial_.data() + task * count_; }
  at::Tensor take() const {
    const at::Tensor result = at::zeros({call_.outputs, call_.inputs}, at::kDouble);
    double* values = result.mutable_data_ptr<double>();
    for (size_t p = 0; p < partial_.size(); ++p) {
      const SnrPair& pair = pairs_[p % count_];
      values[pair.output * call_.inputs + pair.input] += partial_[p];
    }
    return result;
  }

 private:
  static std::vector<SnrPair> pairs(const SnrCoding& z, bool closed_grad) {
    std::vector<SnrPair> found;
    for (int i = 0; i < z.outputs(); ++i) {
      for (int j = 0; j < z.inputs(); ++j) {
        if (closed_grad || z.open(i, j)) found.push_back({i, j});
      }
    }
    return found;
  }

  const std::vector<SnrPair> pairs_;
  const int64_t count_;
  const SnrDots call_;
  std::vector<double> partial_;
};

void run(const SnrAverWork& work, const at::Tensor& like, Dots* dots) {
  const SnrAverKernels& table = table_for(like);
  parallel_rows(like.size(0), table.bytes(work), [&](int64_t task, int64_t first, int64_t last, void* scratch) {
    table.run(work, first, last, dots ? dots->results(task) : nullptr, scratch);
  });
}

}  // namespace

std::vector<at::Tensor> snr_aver_forward(at::TensorList u, const at::Tensor& z) {
  const SnrMatrices in = checked(u);
  Sums sums(SnrCoding(z, in.count(), u[0].scalar_type()), false, in, u[0]);
  run(sums.work(), u[0], nullptr);
  return sums.take();
}

std::vector<at::Tensor> snr_aver_backward(at::TensorList grad_outputs, at::TensorList u, const at::Tensor& z,
                                          bool need_u, bool need_z, bool closed_grad) {
  const SnrMatrices in = checked(u);
  const SnrCoding coding(z, in.count(), u[0].scalar_type());
  const SnrMatrices grads = snr_grad_outputs(grad_outputs, u[0].size(0), u[0].scalar_type(),
                                             std::vector<int64_t>(coding.outputs(), u[0].size(1)));
  std::optional<Sums> sums;
  std::optional<Dots> dots;
  SnrAverWork work{};
  if (need_u) work = sums.emplace(coding, true, grads, u[0]).work();
  if (need_z) work.dots = dots.emplace(coding, in, grads, u[0], closed_grad).call();
  if (sums || dots) run(work, u[0], dots ? &*dots : nullptr);
  std::vector<at::Tensor> found;
  if (sums) found = sums->take();
  if (dots) found.push_back(dots->take().to(z.scalar_type()));
  return found;
}

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("snr_aver_forward", TORCH_FN(snr_aver_forward));
  m.impl("snr_aver_backward", TORCH_FN(snr_aver_backward));
}

}  // namespace mtlk
