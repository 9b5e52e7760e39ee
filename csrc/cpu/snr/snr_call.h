// Builds the kernels' view of SNR's routes from an operator's arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <vector>

#include "snr/snr_args.h"

namespace mtlk {

// The operators, see mtlkernels/operators.txt. Backward passes return the gradients that are wanted, one after another.
std::vector<at::Tensor> snr_trans_forward(at::TensorList u, at::TensorList weights, const at::Tensor& z);
std::vector<at::Tensor> snr_trans_backward(at::TensorList grad_outputs, at::TensorList u, at::TensorList weights,
                                           const at::Tensor& z, bool need_u, bool need_weights, bool need_z,
                                           bool closed_grad);
std::vector<at::Tensor> snr_aver_forward(at::TensorList u, const at::Tensor& z);
std::vector<at::Tensor> snr_aver_backward(at::TensorList grad_outputs, at::TensorList u, const at::Tensor& z,
                                          bool need_u, bool need_z, bool closed_grad);

// A list of matrices with equal numbers of rows, kept with unit column stride as long as this lives.
class SnrMatrices {
 public:
  SnrMatrices(const char* name, at::TensorList tensors, int64_t rows, at::ScalarType dtype);

  int count() const { return static_cast<int>(widths_.size()); }
  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }
  const std::vector<int64_t>& widths() const { return widths_; }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_, widths_;
};

// The coding variables, read once.
class SnrCoding {
 public:
  SnrCoding(const at::Tensor& z, int64_t inputs, at::ScalarType dtype);

  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  double operator()(int i, int j) const { return values_.const_data_ptr<double>()[int64_t{i} * inputs_ + j]; }
  bool open(int i, int j) const { return (*this)(i, j) != 0; }

 private:
  at::Tensor values_;
  int outputs_, inputs_;
};

// The sums of one direction, without their weights: open routes by what they add to.
class SnrSums {
 public:
  // `kept(i, j)`: whether an open route has anything to add. Makes the outputs, contiguous matrices of these widths.
  SnrSums(const SnrCoding& z, bool transposed, const SnrMatrices& in, c10::function_ref<bool(int, int)> kept,
          const at::Tensor& like, std::vector<int64_t> output_widths);
  SnrSums(const SnrSums&) = delete;

  std::vector<SnrRoute>& routes() { return routes_; }
  const SnrSum& sum() const { return sum_; }
  std::vector<at::Tensor> take() { return std::move(outputs_); }

 private:
  std::vector<SnrRoute> routes_;
  std::vector<int> begin_;
  const std::vector<int64_t> widths_;
  std::vector<at::Tensor> outputs_;
  std::vector<void*> pointers_;
  SnrSum sum_;
};

// The gradients of the outputs, one for each of them and as wide.
SnrMatrices snr_grad_outputs(at::TensorList grad_outputs, int64_t rows, at::ScalarType dtype,
                             const std::vector<int64_t>& output_widths);

}  // namespace mtlk
