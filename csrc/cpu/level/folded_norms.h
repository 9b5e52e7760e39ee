// Batch norms by running statistics, folded: what stands behind a product is a scale and a shift a channel. They are
// made of the statistics and parameters at each call, so that they are never stale.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "level/gates_args.h"
#include "runtime/memory.h"

namespace mtlk {

// A norm's statistics and parameters; without a mean there is no norm, and weight and bias may be undefined.
struct NormTensors {
  at::Tensor mean, variance, weight, bias;
  double eps = 0;
};

class FoldedNorms {
 public:
  // Norm i stands behind a product of widths[i] channels with biases[i], of the storage type or null.
  FoldedNorms(const std::vector<NormTensors>& norms, const std::vector<int64_t>& widths, const void* const* biases,
              FoldNorm fold, bool wide, const char* name)
      : item_(wide ? sizeof(double) : sizeof(float)), scales_(norms.size()), shifts_(norms.size()) {
    TORCH_CHECK_VALUE(norms.size() == widths.size(), "mtlkernels: ", name, " must hold ", widths.size(), " norms, got ",
                      norms.size());
    int64_t channels = 0;
    for (const int64_t width : widths) channels += rounded(width);
    memory_.emplace(2, channels * item_);
    char *scale = static_cast<char*>((*memory_)[0]), *shift = static_cast<char*>((*memory_)[1]);
    for (size_t i = 0; i < norms.size(); ++i) {
      if (!norms[i].mean.defined()) continue;
      const RunningNorm norm{part(norms[i].mean, widths[i], name), part(norms[i].variance, widths[i], name),
                             part(norms[i].weight, widths[i], name), part(norms[i].bias, widths[i], name),
                             norms[i].eps};
      TORCH_CHECK_VALUE(norm.variance.values != nullptr || widths[i] == 0, "mtlkernels: ", name,
                        " must have a variance beside a mean");
      fold(norm, biases[i], widths[i], scale, shift);
      scales_[i] = scale;
      shifts_[i] = shift;
      scale += rounded(widths[i]) * item_;
      shift += rounded(widths[i]) * item_;
    }
  }

  // Null where there is no norm.
  const void* const* scales() const { return scales_.data(); }
  const void* const* shifts() const { return shifts_.data(); }

 private:
  static int64_t rounded(int64_t width) { return (width + 15) / 16 * 16; }

  NormPart part(const at::Tensor& tensor, int64_t width, const char* name) {
    if (!tensor.defined()) return {nullptr, Dtype::kFloat32};
    check_plain(tensor);
    TORCH_CHECK_VALUE(
        tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.dim() == 1 && tensor.size(0) == width,
        "mtlkernels: ", name, " must have statistics and parameters of shape [", width, "] on the CPU, got ",
        tensor.sizes(), " on ", tensor.device());
    kept_.push_back(tensor.contiguous());
    return {kept_.back().const_data_ptr(), dtype_of(tensor)};
  }

  int64_t item_;
  std::optional<Scratch> memory_;
  std::vector<at::Tensor> kept_;
  std::vector<const void*> scales_, shifts_;
};

}  // namespace mtlk
