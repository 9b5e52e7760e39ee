// The norms of a level's layers as PyTorch's modules hold them, where they normalize by the batch.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/level/spec.h"

namespace mtlk {

class NormModules {
 public:
  // Reads them from a list or a tuple with one of modules, or None, for each layer; their weights and biases become the
  // level's. False where they are not what Python's checks take, where the checks know better what is wrong, and where
  // a norm uses its running statistics. Kernels check shapes and dtypes of weights and biases.
  bool read(PyObject* norms, const LevelSpec& spec, LevelTensors& tensors);

  // What nn.BatchNorm1d does with a batch's statistics in training: the means of all layers with norms, then the biased
  // variances, as kernels leave them. Autograd does not count it as a change of the running ones, as there.
  void update(at::TensorList statistics, int64_t rows) const;

 private:
  // The running statistics of a batch norm that brings them up to date.
  struct Running {
    at::Tensor mean, variance, count;  // no count: undefined
    double momentum;                   // none, so that they are means over all batches: NaN
    size_t norm, expert;               // among the layers with norms, and of the level
  };

  bool read_module(PyObject* module, const LevelSpec& spec, int64_t layer, LevelTensors& tensors);
  bool read_running(PyObject* own, int64_t width, at::ScalarType dtype, Running running);
  template <typename T>
  void update_as(at::TensorList statistics, int64_t rows) const;

  std::vector<Running> running_;
  std::vector<PyObject*> batch_norms_;  // borrowed, to see one that is there twice
  size_t norms_ = 0;                    // layers that have one
};

}  // namespace mtlk
