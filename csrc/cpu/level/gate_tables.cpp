#include "level/gate_tables.h"

#include "runtime/check.h"

namespace mtlk {

GateTables::GateTables(at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, int64_t experts) {
  MTLK_CHECK_VALUE(!gate_sizes.empty(), "there must be a gate");
  int64_t column = 0;
  for (const int64_t size : gate_sizes) {
    MTLK_CHECK_VALUE(size >= 0 && size <= static_cast<int64_t>(gate_experts.size()), "gate_sizes must be in [0, ",
                     gate_experts.size(), "], the columns that gate_experts has, got ", size);
    begin_.push_back(static_cast<int>(column));
    sizes_.push_back(static_cast<int>(size));
    column += size;
  }
  MTLK_CHECK_VALUE(static_cast<int64_t>(gate_experts.size()) == column,
                   "gate_experts must hold an expert for each column of the gates, got ", gate_experts.size(), " for ",
                   column);
  use_begin_.assign(experts + 1, 0);
  for (const int64_t e : gate_experts) {
    MTLK_CHECK_VALUE(e >= 0 && e < experts, "gate_experts must name experts in [0, ", experts, "), got ", e);
    ++use_begin_[e + 1];
  }
  for (int64_t e = 0; e < experts; ++e) use_begin_[e + 1] += use_begin_[e];
  uses_.resize(gate_experts.size());
  std::vector<int> next(use_begin_.begin(), use_begin_.end() - 1);
  for (int gate = 0, c = 0; gate < static_cast<int>(sizes_.size()); ++gate) {
    for (int i = 0; i < sizes_[gate]; ++i, ++c) uses_[next[gate_experts[c]]++] = {gate, c};
  }
  gates_.count = static_cast<int>(sizes_.size());
  gates_.columns = static_cast<int>(column);
  gates_.sizes = sizes_.data();
  gates_.begin = begin_.data();
  gates_.use_begin = use_begin_.data();
  gates_.uses = uses_.data();
}

void GateTables::set_logits(at::TensorList logits, int64_t rows, at::ScalarType experts) {
  MTLK_CHECK_VALUE(logits.size() == sizes_.size(), "gate_logits must hold a tensor for each of ", sizes_.size(),
                   " gates, got ", logits.size());
  for (size_t k = 0; k < logits.size(); ++k) {
    const at::Tensor& tensor = logits[k];
    check_dense("gate_logits", k, tensor, logits[0].scalar_type());
    MTLK_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == sizes_[k], "gate_logits[", k,
                     "] must have shape [", rows, ", ", sizes_[k], "], got ", tensor.sizes());
    MTLK_CHECK_TYPE(tensor.scalar_type() != at::kDouble || experts == at::kDouble, "gate_logits[", k,
                    "] must be float32 or narrower beside experts in ", experts);
    pointers_.push_back(tensor.const_data_ptr());
    row_stride_.push_back(tensor.stride(0));
    column_stride_.push_back(tensor.stride(1));
  }
  gates_.dtype = dtype_of(logits[0]);
  gates_.logits = pointers_.data();
  gates_.row_stride = row_stride_.data();
  gates_.column_stride = column_stride_.data();
}

void GateTables::set_weights(const void* const* weights, const int64_t* ld, const void* const* biases,
                             const int* streams) {
  gates_.weights = weights;
  gates_.weight_ld = ld;
  gates_.biases = biases;
  gates_.streams = streams;
}

void GateTables::set_norms(const void* const* scales, const void* const* shifts) {
  gates_.scales = scales;
  gates_.shifts = shifts;
}

}  // namespace mtlk
