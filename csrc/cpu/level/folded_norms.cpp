#include "level/folded_norms.h"

#include "level/gate_tables.h"
#include "runtime/check.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

int64_t rounded(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace

FoldedNorms::FoldedNorms(const std::vector<NormTensors>& norms, const std::vector<int64_t>& widths,
                         const void* const* biases, FoldNorm fold, bool wide, const char* name)
    : scales_(norms.size()), shifts_(norms.size()) {
  MTLK_CHECK_VALUE(norms.size() == widths.size(), name, " must hold ", widths.size(), " norms, got ", norms.size());
  const int64_t item = wide ? sizeof(double) : sizeof(float);
  int64_t channels = 0;
  for (size_t i = 0; i < norms.size(); ++i) channels += norms[i].mean.defined() ? rounded(widths[i]) : 0;
  memory_.emplace(2, channels * item);
  char *scale = static_cast<char*>((*memory_)[0]), *shift = static_cast<char*>((*memory_)[1]);
  for (size_t i = 0; i < norms.size(); ++i) {
    if (norms[i].scale) {
      MTLK_CHECK_VALUE(!biases[i], "the bias before a shift must be None, as that has it");
      scales_[i] = norms[i].scale;
      shifts_[i] = norms[i].shift;
    }
    if (!norms[i].mean.defined()) continue;
    const RunningNorm norm{part(norms[i].mean, widths[i], name), part(norms[i].variance, widths[i], name),
                           part(norms[i].weight, widths[i], name), part(norms[i].bias, widths[i], name), norms[i].eps};
    MTLK_CHECK_VALUE(norm.variance.values != nullptr || widths[i] == 0, name, " must have a variance beside a mean");
    fold(norm, biases[i], widths[i], scale, shift);
    scales_[i] = scale;
    shifts_[i] = shift;
    scale += rounded(widths[i]) * item;
    shift += rounded(widths[i]) * item;
  }
}

NormPart FoldedNorms::part(const at::Tensor& tensor, int64_t width, const char* name) {
  if (!tensor.defined()) return {nullptr, Dtype::kFloat32};
  check_plain(tensor);
  MTLK_CHECK_VALUE(tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.dim() == 1 && tensor.size(0) == width,
                   name, " must have statistics and parameters of shape [", width, "] on the CPU, got ", tensor.sizes(),
                   " on ", tensor.device());
  MTLK_CHECK_VALUE(tensor.storage().nbytes() >= reached_bytes(tensor), name, " must have ", reached_bytes(tensor),
                   " bytes of memory for each of their tensors, got ", tensor.storage().nbytes());
  kept_.push_back(tensor.contiguous());
  return {kept_.back().const_data_ptr(), dtype_of(tensor)};
}

}  // namespace mtlk
