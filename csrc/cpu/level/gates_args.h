// Builds the kernels' view of gates from tensors.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "level/expert_mixture_args.h"
#include "runtime/tensors.h"

namespace mtlk {

// Owns what a Gates points to.
class GateTables {
 public:
  GateTables(at::TensorList logits, at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, int64_t experts)
      : GateTables(gate_experts, gate_sizes, experts) {
    set_logits(logits);
  }

  // Gates whose logits are set later.
  GateTables(at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, int64_t experts) {
    TORCH_CHECK_VALUE(!gate_sizes.empty(), "mtlkernels: there must be a gate");
    int column = 0;
    for (const int64_t size : gate_sizes) {
      begin_.push_back(column);
      sizes_.push_back(static_cast<int>(size));
      column += static_cast<int>(size);
    }
    TORCH_CHECK_VALUE(static_cast<int64_t>(gate_experts.size()) == column,
                      "mtlkernels: gate_experts must hold an expert for each column of the gates, got ",
                      gate_experts.size(), " for ", column);
    use_begin_.assign(experts + 1, 0);
    for (const int64_t e : gate_experts) {
      TORCH_CHECK_VALUE(e >= 0 && e < experts, "mtlkernels: gate_experts must name experts in [0, ", experts, "), got ",
                        e);
      ++use_begin_[e + 1];
    }
    for (int64_t e = 0; e < experts; ++e) use_begin_[e + 1] += use_begin_[e];
    uses_.resize(gate_experts.size());
    std::vector<int> next(use_begin_.begin(), use_begin_.end() - 1);
    for (int gate = 0, c = 0; gate < static_cast<int>(sizes_.size()); ++gate) {
      for (int i = 0; i < sizes_[gate]; ++i, ++c) uses_[next[gate_experts[c]]++] = {gate, c};
    }
    gates_ = {};
    gates_.count = static_cast<int>(sizes_.size());
    gates_.columns = column;
    gates_.sizes = sizes_.data();
    gates_.begin = begin_.data();
    gates_.use_begin = use_begin_.data();
    gates_.uses = uses_.data();
  }
  GateTables(const GateTables&) = delete;

  void set_logits(at::TensorList logits) {
    TORCH_CHECK_VALUE(logits.size() == sizes_.size(), "mtlkernels: gate_logits must hold a tensor for each of ",
                      sizes_.size(), " gates, got ", logits.size());
    for (const at::Tensor& tensor : logits) {
      check_plain(tensor);
      TORCH_CHECK_TYPE(tensor.scalar_type() == logits[0].scalar_type(), "mtlkernels: gate_logits must share one dtype");
      TORCH_CHECK_VALUE(tensor.dim() == 2, "mtlkernels: gate_logits must hold matrices, got ", tensor.sizes());
      pointers_.push_back(tensor.const_data_ptr());
      row_stride_.push_back(tensor.stride(0));
      column_stride_.push_back(tensor.stride(1));
    }
    gates_.dtype = dtype_of(logits[0]);
    gates_.logits = pointers_.data();
    gates_.row_stride = row_stride_.data();
    gates_.column_stride = column_stride_.data();
  }

  // Linear layers in the place of logits; what the pointers point to must outlive this.
  void set_weights(const std::vector<const void*>& weights, const std::vector<int64_t>& ld,
                   const std::vector<const void*>& biases, const std::vector<int>& streams) {
    gates_.weights = weights.data();
    gates_.weight_ld = ld.data();
    gates_.biases = biases.data();
    gates_.streams = streams.data();
  }

  // Of norms behind those layers.
  void set_norms(const void* const* scales, const void* const* shifts) {
    gates_.scales = scales;
    gates_.shifts = shifts;
  }

  const Gates& gates() const { return gates_; }

 private:
  std::vector<int> sizes_, begin_, use_begin_;
  std::vector<GateUse> uses_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> row_stride_, column_stride_;
  Gates gates_;
};

// What the kernels rely on of the logits, given rows and the experts' dtype.
inline void check_gates(at::TensorList logits, const Gates& gates, int64_t rows, at::ScalarType experts) {
  for (size_t k = 0; k < logits.size(); ++k) {
    TORCH_CHECK_VALUE(logits[k].is_cpu(), "mtlkernels: gate_logits[", k, "] must be on the CPU, got ",
                      logits[k].device());
    TORCH_CHECK_VALUE(logits[k].size(0) == rows && logits[k].size(1) == gates.sizes[k], "mtlkernels: gate_logits[", k,
                      "] must have shape [", rows, ", ", gates.sizes[k], "], got ", logits[k].sizes());
    TORCH_CHECK_TYPE(logits[k].scalar_type() != at::kDouble || experts == at::kDouble, "mtlkernels: gate_logits[", k,
                     "] must be float32 or narrower beside experts in ", experts);
  }
}

}  // namespace mtlk
