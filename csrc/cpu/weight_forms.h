// Weights in the form that a set of kernels wants.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace mtlk {

// Owns whatever had to be copied to fit the kernels.
class WeightForms {
 public:
  const void* const* pointers() const { return pointers_.data(); }
  const int64_t* ld() const { return ld_.data(); }

  // Weights as they are, for kernels that read rows of the storage type.
  void set_natural(at::TensorList weights) {
    for (const at::Tensor& weight : weights) {
      kept_.push_back(weight.stride(1) == 1 ? weight : weight.contiguous());
      pointers_.push_back(kept_.back().const_data_ptr());
      ld_.push_back(kept_.back().stride(0));
    }
  }

  // Weights in the form that the kernels want; `transposed` swaps inputs and outputs where they are prepared.
  void set(at::TensorList weights, const ExpertMixtureKernels& table, bool transposed) {
    if (table.form == WeightForm::kNatural) return set_natural(weights);
    if (table.form == WeightForm::kCompute) {
      std::vector<at::Tensor> wide(weights.size());
      parallel_tasks(at::get_num_threads(), weights.size(),
                     [&](int64_t i) { wide[i] = weights[i].to(at::kFloat).contiguous(); });
      return set_natural(wide);
    }
    std::vector<at::Tensor> rows;
    std::vector<int64_t> offsets{0};
    for (const at::Tensor& weight : weights) {
      const bool turned = weight.stride(1) != 1 && weight.stride(0) != 1;
      rows.push_back(transposed ? (turned ? weight.contiguous() : weight).t()
                                : (turned ? weight.contiguous() : weight));
      offsets.push_back(offsets.back() + table.prepared_bytes(rows.back().size(0), rows.back().size(1)));
    }
    prepared_.emplace(1, offsets.back());
    char* memory = static_cast<char*>((*prepared_)[0]);
    parallel_tasks(at::get_num_threads(), weights.size(), [&](int64_t i) {
      const at::Tensor& weight = rows[i];
      table.prepare(weight.const_data_ptr(), weight.stride(0), weight.stride(1), weight.size(0), weight.size(1),
                    memory + offsets[i]);
    });
    for (size_t i = 0; i < weights.size(); ++i) pointers_.push_back(memory + offsets[i]);
    ld_.assign(weights.size(), 0);
  }

 private:
  std::vector<at::Tensor> kept_;
  std::optional<Scratch> prepared_;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_;
};

}  // namespace mtlk
