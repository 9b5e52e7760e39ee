// Gradients of a level as a backward call returns them.
#pragma once

#include <vector>

#include "gemm/engine.h"
#include "level/level_args.h"
#include "level/level_kernels.h"
#include "level/spec.h"

namespace mtlk {

// What a backward call returns, and the sums of the compute type that its kernels add to where these cannot be the
// results themselves. A weight that gets its whole gradient at once has none.
class LevelGradients {
 public:
  // Of those tensors that there are and whose kind is needed; of linear gates those of the logits.
  LevelGradients(const LevelShape& level, const LevelTensors& tensors, const EngineTable& engine, const Needs& needs);
  LevelGradients(const LevelGradients&) = delete;

  // Tells the kernels where they go.
  void point(GradientArgs& args) const;
  void point(NormLayer* layers) const;

  // Nothing has a gradient.
  void zero();

  // All that are there, in the order of the level's tensors; those of linear gates, if any, are made by `kernels`.
  Tensors take(const std::vector<int>& gate_streams, const GateKernels& kernels);

 private:
  int64_t weight_bytes() const;

  // Tensors and where their memory is; null for an undefined one.
  struct Results {
    Tensors tensors;
    std::vector<void*> pointers;

    void add(const at::Tensor& tensor) {
      tensors.push_back(tensor);
      pointers.push_back(tensor.defined() ? tensor.mutable_data_ptr() : nullptr);
    }
    void* const* data(size_t from = 0) const { return tensors.empty() ? nullptr : pointers.data() + from; }
    bool any() const;
  };

  const LevelTensors& level_;
  const Needs needs_;
  const at::ScalarType compute_;
  const int experts_, layers_;
  Results inputs_, weights_, biases_, scales_, shifts_, slopes_, logits_, weight_sums_, bias_sums_;
  std::vector<int64_t> sum_ld_;
};

}  // namespace mtlk
