// Lists of gradients, T tasks' for each of P parameters, and the two passes over them.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "pcgrad/pcgrad_args.h"
#include "runtime/api.h"

namespace mtlk {

class MTLK_API GradientLists {
 public:
  // That of task t for parameter p is number p * tasks + t, or undefined where the task has none. All of a parameter
  // are dense tensors on the CPU of one shape and dtype, which is checked.
  GradientLists(std::vector<at::Tensor> grads, int64_t tasks);

  // The tasks' inner products [T, T], float64.
  at::Tensor gram() const;

  // For each parameter the sum of its gradients by coefficients [T], float64; undefined where no task has one.
  std::vector<at::Tensor> combine(const at::Tensor& coefficients) const;

 private:
  // The gradients of one parameter, walked linearly, and what serves their dtype.
  struct Parameter {
    std::vector<int> tasks;  // that have one
    std::vector<at::Tensor> grads;
    std::vector<const void*> addresses;
    const PcgradKernels* kernels = nullptr;
    int64_t elements = 0, bytes = 0;  // of each of them
    at::DimVector sizes, strides;
    at::ScalarType dtype = at::ScalarType::Undefined;
  };
  struct Piece {
    const Parameter* parameter;
    PcgradPiece run;
  };

  // For a pass. Throws a ValueError where a gradient's memory is not there any more: between the passes its caller's
  // code runs.
  std::vector<Piece> cut() const;

  const int64_t tasks_;
  std::vector<Parameter> parameters_;
};

}  // namespace mtlk
