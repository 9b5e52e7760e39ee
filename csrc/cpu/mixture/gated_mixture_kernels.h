// gated_mixture for a run of rows: the experts' outputs are read once, and every gate takes what it needs of them.
#pragma once

#include "level/gates.h"
#include "mixture/gated_mixture_args.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename T>
class GatedMixtureRows {
 public:
  using C = Compute<T>;

  static int64_t bytes(const GatedMixtureArgs& args) {
    return Arena::bytes<C>(args.gates.count * args.features) + 2 * Arena::bytes<C>(args.features) +
           2 * Arena::bytes<C>(args.gates.columns * kGroup);
  }

  GatedMixtureRows(const GatedMixtureArgs& args, void* memory) : args_(args), gates_(args.gates) {
    Arena arena(memory);
    sums_ = arena.take<C>(gates_.count * args.features);
    value_ = arena.take<C>(args.features);
    grad_ = arena.take<C>(args.features);
    probabilities_ = arena.take<C>(gates_.columns * kGroup);
    inner_ = arena.take<C>(gates_.columns * kGroup);
  }

  void forward(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kGroup) {
      const int64_t n = rows_of_group(last, row);
      gate_probabilities(gates_, row, n, probabilities_);
      for (int64_t r = 0; r < n; ++r) mix(row + r, r);
    }
  }

  void backward(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kGroup) {
      const int64_t n = rows_of_group(last, row);
      gate_probabilities(gates_, row, n, probabilities_);
      std::memset(inner_, 0, gates_.columns * kGroup * sizeof(C));
      for (int64_t r = 0; r < n; ++r) unmix(row + r, r);
      for (int k = 0; args_.grad_logits && k < gates_.count; ++k) {
        write_logit_gradient(gates_, k, probabilities_, inner_, row, n, args_.grad_logits[k]);
      }
    }
  }

 private:
  const T* values(int64_t row, int64_t e) const {
    return static_cast<const T*>(args_.values) + row * args_.row_stride + e * args_.expert_stride;
  }

  void mix(int64_t row, int64_t r) {
    const int64_t features = args_.features;
    std::memset(sums_, 0, gates_.count * features * sizeof(C));
    for (int64_t e = 0; e < args_.experts; ++e) {
      if (gates_.use_begin[e] == gates_.use_begin[e + 1]) continue;
      widen(values(row, e), value_, features);
      for (int u = gates_.use_begin[e]; u < gates_.use_begin[e + 1]; ++u) {
        const C p = probabilities_[gates_.uses[u].column * kGroup + r];
        C* sum = sums_ + gates_.uses[u].gate * features;
        for (int64_t i = 0; i < features; ++i) sum[i] += p * value_[i];
      }
    }
    for (int k = 0; k < gates_.count; ++k) {
      narrow(sums_ + k * features, static_cast<T*>(args_.outputs[k]) + row * features, features);
    }
  }

  void unmix(int64_t row, int64_t r) {
    const int64_t features = args_.features;
    for (int k = 0; k < gates_.count; ++k) {
      const T* grad = static_cast<const T*>(args_.grad_outputs[k]) + row * args_.grad_output_ld[k];
      widen(grad, sums_ + k * features, features);
    }
    for (int64_t e = 0; e < args_.experts; ++e) {
      if (args_.grad_logits) widen(values(row, e), value_, features);
      std::memset(grad_, 0, features * sizeof(C));
      for (int u = gates_.use_begin[e]; u < gates_.use_begin[e + 1]; ++u) {
        const C p = probabilities_[gates_.uses[u].column * kGroup + r];
        const C* grad = sums_ + gates_.uses[u].gate * features;
        if (args_.grad_logits) inner_[gates_.uses[u].column * kGroup + r] = dot(grad, value_, features);
        if (!args_.grad_values) continue;
        for (int64_t i = 0; i < features; ++i) grad_[i] += p * grad[i];
      }
      if (!args_.grad_values) continue;
      narrow(grad_, static_cast<T*>(args_.grad_values) + (row * args_.experts + e) * features, features);
    }
  }

  const GatedMixtureArgs& args_;
  const Gates& gates_;
  C *sums_, *value_, *grad_, *probabilities_, *inner_;
};

template <typename T>
GatedMixtureKernels gated_mixture_kernels() {
  return {GatedMixtureRows<T>::bytes,
          [](const GatedMixtureArgs& args, int64_t first, int64_t last, void* scratch) {
            GatedMixtureRows<T>(args, scratch).forward(first, last);
          },
          [](const GatedMixtureArgs& args, int64_t first, int64_t last, void* scratch) {
            GatedMixtureRows<T>(args, scratch).backward(first, last);
          }};
}

}  // namespace MTLK_ISA
}  // namespace mtlk
