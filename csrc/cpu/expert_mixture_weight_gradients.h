// The weights' gradients of expert_mixture, with the batch as the depth of their product.
#pragma once

#include "expert_mixture_backward.h"

namespace mtlk {
namespace MTLK_ISA {

// The weights' gradients of a chunk, as tasks that write apart from each other.
template <typename Engine>
class WeightGradients {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Gradient = typename Engine::Gradient;
  using Operand = typename Engine::Operand;

  WeightGradients(const BackwardArgs& args, const BackwardChunk& chunk, const BackwardLayout<Engine>& layout)
      : args_(args), level_(args.level), chunk_(chunk), layout_(layout), streams_(stream_count(args.level)) {}

  // Operands to make: every stream, then every hidden layer's outputs.
  int64_t operands() const { return streams_ + static_cast<int64_t>(level_.layers - 1) * level_.experts; }

  void make_operand(int64_t task) const {
    if (task < streams_) {
      const int stream = static_cast<int>(task);
      const int64_t ld = level_.input_ld[stream];
      return make(0, stream, static_cast<const T*>(level_.inputs[stream]) + chunk_.row * ld, ld, kNone);
    }
    const int l = static_cast<int>((task - streams_) / level_.experts) + 1;
    const int e = static_cast<int>((task - streams_) % level_.experts);
    make(l, e, hidden_rows(l, e), level_.widths[l], hidden_code(l));
  }

  // Tasks: an expert's layer, a run of its columns.
  int64_t tasks() const {
    int64_t count = 0;
    for (int l = 0; l < level_.layers; ++l) count += level_.experts * columns(l);
    return count;
  }

  void run(int64_t task) const {
    int l = 0;
    while (task >= level_.experts * columns(l)) task -= level_.experts * columns(l++);
    const int e = static_cast<int>(task / columns(l));
    const int64_t column = task % columns(l) * Engine::kColumns, width = level_.widths[l];
    const int64_t at = static_cast<int64_t>(l) * level_.experts + e, outputs = level_.widths[l + 1];
    const Gradient* gradient = static_cast<const Gradient*>(chunk_.gradients) + layout_.gradient_offset(l, e);
    const bool add = chunk_.row > 0;
    if (args_.need_weights && column < width) {
      int64_t ld = 0;
      const Operand* operand = operand_of(l, e, &ld);
      const int64_t n = width - column < Engine::kColumns ? width - column : Engine::kColumns;
      Engine::weight_gradient(gradient, outputs, operand, ld, chunk_.rows, column, n,
                              static_cast<C*>(args_.weight_sums[at]), args_.weight_sum_ld[l], add);
    }
    if (args_.need_biases && column == 0) {
      Engine::bias_gradient(gradient, outputs, chunk_.rows, static_cast<C*>(args_.bias_sums[at]), add);
    }
  }

 private:
  int64_t columns(int l) const {
    const int64_t count = (level_.widths[l] + Engine::kColumns - 1) / Engine::kColumns;
    return count > 0 ? count : 1;
  }
  const T* hidden_rows(int l, int e) const {
    return static_cast<const T*>(args_.saved[l - 1]) + (e * level_.rows + chunk_.row) * level_.widths[l];
  }
  // The activation that saved values still need.
  int hidden_code(int l) const {
    return from_input(level_.activations[l - 1]) ? level_.activations[l - 1] : static_cast<int>(kNone);
  }

  Operand* place(int l, int index) const {
    return static_cast<Operand*>(chunk_.operands) + layout_.operand_offset(l, index, streams_);
  }

  void make(int l, int index, const T* rows, int64_t ld, int code) const {
    const int64_t width = level_.widths[l];
    if (code == kNone && Engine::direct_operand(rows, width)) return;
    with_activation(code, [&](auto constant) {
      Engine::make_operand(rows, ld, chunk_.rows, width, place(l, index), [&](C* values, int64_t n, int64_t, int64_t) {
        if constexpr (decltype(constant)::value != kNone) {
          for (int64_t i = 0; i < n; i += Simd<C>::lanes) {
            mtlk::MTLK_ISA::store(values + i, activate<decltype(constant)::value, C>(load(values + i)));
          }
        }
      });
    });
  }

  const Operand* operand_of(int l, int e, int64_t* ld) const {
    const int index = l == 0 ? level_.expert_inputs[e] : e;
    const T* rows =
        l == 0 ? static_cast<const T*>(level_.inputs[index]) + chunk_.row * level_.input_ld[index] : hidden_rows(l, e);
    if (l == 0 || hidden_code(l) == kNone) {
      if (const Operand* direct = Engine::direct_operand(rows, level_.widths[l])) {
        *ld = l == 0 ? level_.input_ld[index] : level_.widths[l];
        return direct;
      }
    }
    *ld = Engine::rounded(level_.widths[l]);
    return place(l, index);
  }

  const BackwardArgs& args_;
  const Level& level_;
  const BackwardChunk& chunk_;
  const BackwardLayout<Engine>& layout_;
  const int streams_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
