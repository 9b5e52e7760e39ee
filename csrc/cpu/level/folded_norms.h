// Batch norms by running statistics, folded: what stands behind a product is a scale and a shift a channel. They are
// made of the statistics and parameters at each call, so that they are never stale.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "level/level_args.h"
#include "runtime/memory.h"

namespace mtlk {

// A norm's statistics and parameters; without a mean there is no norm, and weight and bias may be undefined. Or what
// somebody has made of one and of the bias before it, of the compute type.
struct NormTensors {
  at::Tensor mean, variance, weight, bias;
  double eps = 0;
  const void *scale = nullptr, *shift = nullptr;
};

// Those of a level, by layer and expert, and of its gates; empty without any.
struct RunningNorms {
  std::vector<NormTensors> experts, gates;
};

class FoldedNorms {
 public:
  // Norm i stands behind a product of widths[i] channels with biases[i], of the storage type or null.
  FoldedNorms(const std::vector<NormTensors>& norms, const std::vector<int64_t>& widths, const void* const* biases,
              FoldNorm fold, bool wide, const char* name);

  // Null where there is no norm.
  const void* const* scales() const { return scales_.data(); }
  const void* const* shifts() const { return shifts_.data(); }

 private:
  NormPart part(const at::Tensor& tensor, int64_t width, const char* name);

  std::optional<Scratch> memory_;
  std::vector<at::Tensor> kept_;
  std::vector<const void*> scales_, shifts_;
};

}  // namespace mtlk
