// Weights in the form that a set of kernels wants.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "prepared_weights.h"

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

  // Weights in the form that the kernels want; `transposed` swaps inputs and outputs where they are prepared, and
  // `ready` is what was prepared of them before.
  void set(at::TensorList weights, const ExpertMixtureKernels& table, bool transposed,
           PreparedWeights::Memory ready = nullptr) {
    if (table.form == WeightForm::kNatural) return set_natural(weights);
    if (table.form == WeightForm::kCompute) {
      std::vector<at::Tensor> wide(weights.size());
      parallel_tasks(at::get_num_threads(), weights.size(),
                     [&](int64_t i) { wide[i] = weights[i].to(at::kFloat).contiguous(); });
      return set_natural(wide);
    }
    std::vector<int64_t> offsets{0};
    for (const at::Tensor& weight : weights) {
      const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
      offsets.push_back(offsets.back() + table.prepared_bytes(outputs, inputs));
    }
    bytes_ = offsets.back();
    prepared_ = ready ? std::move(ready) : prepare(weights, table, transposed, offsets);
    for (size_t i = 0; i < weights.size(); ++i) {
      pointers_.push_back(static_cast<char*>((*prepared_)[0]) + offsets[i]);
    }
    ld_.assign(weights.size(), 0);
  }

  // What `set` has prepared, and its size.
  const PreparedWeights::Memory& prepared() const { return prepared_; }
  int64_t bytes() const { return bytes_; }

 private:
  static PreparedWeights::Memory prepare(at::TensorList weights, const ExpertMixtureKernels& table, bool transposed,
                                         const std::vector<int64_t>& offsets) {
    auto prepared = std::make_shared<const Scratch>(1, offsets.back());
    char* memory = static_cast<char*>((*prepared)[0]);
    std::vector<at::Tensor> rows;
    for (const at::Tensor& weight : weights) {
      const at::Tensor plain = weight.stride(1) != 1 && weight.stride(0) != 1 ? weight.contiguous() : weight;
      rows.push_back(transposed ? plain.t() : plain);
    }
    parallel_tasks(at::get_num_threads(), weights.size(), [&](int64_t i) {
      const at::Tensor& weight = rows[i];
      table.prepare(weight.const_data_ptr(), weight.stride(0), weight.stride(1), weight.size(0), weight.size(1),
                    memory + offsets[i]);
    });
    return prepared;
  }

  std::vector<at::Tensor> kept_;
  PreparedWeights::Memory prepared_;
  int64_t bytes_ = 0;
  std::vector<const void*> pointers_;
  std::vector<int64_t> ld_;
};

}  // namespace mtlk
