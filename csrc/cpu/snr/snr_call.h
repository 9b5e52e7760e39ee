// Builds the kernels' view of SNR's routes from an operator's arguments.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "level/gate_tables.h"
#include "runtime/kernels.h"
#include "runtime/memory.h"

namespace mtlk {

inline at::Tensor with_unit_stride(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// A list of matrices with equal numbers of rows, kept with unit column stride as long as this lives.
class SnrMatrices {
 public:
  SnrMatrices(const char* name, at::TensorList tensors, int64_t rows, at::ScalarType dtype) {
    TORCH_CHECK_VALUE(!tensors.empty(), "mtlkernels: ", name, " must hold at least one tensor");
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& x = tensors[i];
      check_plain(x);
      TORCH_CHECK_TYPE(x.scalar_type() == dtype && x.layout() == at::kStrided, "mtlkernels: ", name, "[", i,
                       "] must be a dense tensor of ", dtype, ", got ", x.layout(), " of ", x.scalar_type());
      TORCH_CHECK_VALUE(x.is_cpu(), "mtlkernels: ", name, "[", i, "] must be on the CPU, got ", x.device());
      TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows, "mtlkernels: ", name, "[", i, "] must have shape [", rows,
                        ", D], got ", x.sizes());
      kept_.push_back(with_unit_stride(x));
      pointers_.push_back(kept_.back().const_data_ptr());
      ld_.push_back(kept_.back().stride(0));
      widths_.push_back(x.size(1));
    }
  }
  int count() const { return static_cast<int>(widths_.size()); }
  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }
  const int64_t* widths() const { return widths_.data(); }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_, widths_;
};

// The coding variables, read once.
class SnrCoding {
 public:
  SnrCoding(const at::Tensor& z, int64_t inputs, at::ScalarType dtype) {
    check_plain(z);
    TORCH_CHECK_VALUE(z.is_cpu() && z.layout() == at::kStrided && z.dim() == 2 && z.size(0) > 0 && z.size(1) == inputs,
                      "mtlkernels: z must be a dense tensor [I, ", inputs, "] on the CPU, got ", z.sizes());
    dtype_of(z);
    TORCH_CHECK_TYPE(z.scalar_type() != at::kDouble || dtype == at::kDouble,
                     "mtlkernels: z must be float32 or narrower beside u in ", dtype);
    values_ = z.to(at::kDouble).contiguous();
    outputs_ = static_cast<int>(z.size(0));
    inputs_ = static_cast<int>(inputs);
  }
  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  double operator()(int i, int j) const { return values_.const_data_ptr<double>()[i * inputs_ + j]; }
  bool open(int i, int j) const { return (*this)(i, j) != 0; }

 private:
  at::Tensor values_;
  int outputs_, inputs_;
};

// The sums of one direction, without their weights: open routes by what they add to.
class SnrSums {
 public:
  // `kept(i, j)`: whether an open route has anything to add.
  template <typename F>
  SnrSums(const SnrCoding& z, bool transposed, const SnrMatrices& in, F kept) {
    const int outputs = transposed ? z.inputs() : z.outputs(), inputs = transposed ? z.outputs() : z.inputs();
    begin_.push_back(0);
    for (int to = 0; to < outputs; ++to) {
      for (int from = 0; from < inputs; ++from) {
        const int i = transposed ? from : to, j = transposed ? to : from;
        if (z.open(i, j) && kept(i, j)) routes_.push_back({to, from, z(i, j), nullptr, 0});
      }
      begin_.push_back(static_cast<int>(routes_.size()));
    }
    sum_.inputs = inputs;
    sum_.outputs = outputs;
    sum_.input_widths = in.widths();
    sum_.in = in.pointers();
    sum_.in_ld = in.ld();
    sum_.routes = routes_.data();
    sum_.route_begin = begin_.data();
    sum_.transposed = transposed;
  }
  SnrSums(const SnrSums&) = delete;

  // Makes the outputs, contiguous matrices.
  void set_outputs(int64_t rows, const std::vector<int64_t>& widths, const at::TensorOptions& options) {
    widths_ = widths;
    for (const int64_t width : widths_) {
      outputs_.push_back(pooled({rows, width}, options));
      pointers_.push_back(outputs_.back().mutable_data_ptr());
    }
    sum_.rows = rows;
    sum_.output_widths = widths_.data();
    sum_.out = pointers_.data();
  }

  std::vector<SnrRoute>& routes() { return routes_; }
  const SnrSum& sum() const { return sum_; }
  std::vector<at::Tensor> take() { return std::move(outputs_); }

 private:
  std::vector<SnrRoute> routes_;
  std::vector<int> begin_;
  std::vector<int64_t> widths_;
  std::vector<at::Tensor> outputs_;
  std::vector<void*> pointers_;
  SnrSum sum_{};
};

inline void check_grad_outputs(at::TensorList grad_outputs, int outputs) {
  TORCH_CHECK_VALUE(static_cast<int>(grad_outputs.size()) == outputs,
                    "mtlkernels: grad_outputs must hold a tensor for each of ", outputs, " outputs, got ",
                    grad_outputs.size());
}

}  // namespace mtlk
