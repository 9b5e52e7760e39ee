// The weights' gradients of a chain, with the batch as the depth of their product.
#pragma once

#include "level/chain_backward_kernels.h"
#include "level/weight_columns.h"

namespace mtlk {
namespace MTLK_ISA {

// The weights' gradients of a chunk, as tasks that write apart from each other.
template <typename Engine>
class ChainWeightGradients {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Gradient = typename Engine::Gradient;
  using Operand = typename Engine::Operand;

  ChainWeightGradients(const ChainBackwardArgs& args, const BackwardChunk& chunk, const BackwardLayout<Engine>& layout)
      : args_(args), level_(args.level), chunk_(chunk), layout_(layout) {}

  // What experts read of a stream, for all of them.
  void make_stream(int stream) const {
    if (Engine::direct_operand(stream_rows(stream), level_.widths[0])) return;
    Engine::make_operand(stream_rows(stream), level_.input_ld[stream], chunk_.rows, level_.widths[0],
                         stream_operand(stream), Unchanged{});
  }

  // Tasks: a layer of one of the group's experts, a run of its columns.
  int64_t tasks() const {
    int64_t count = 0;
    for (int l = 0; l < level_.layers; ++l) count += layout_.experts * columns(l);
    return count;
  }

  void run(int64_t task, void* memory) const {
    int l = 0;
    while (task >= layout_.experts * columns(l)) task -= layout_.experts * columns(l++);
    const int index = static_cast<int>(task / columns(l)), e = level_.order[chunk_.first + index];
    const int64_t column = task % columns(l) * Engine::kColumns, width = level_.widths[l];
    const int64_t at = weight_number(level_, l, e);
    const Gradient* gradient = static_cast<const Gradient*>(chunk_.gradients) + layout_.gradient_offset(l, index);
    if (args_.need_weights && column < width) {
      const WeightScratch<Engine> s(level_, chunk_.capacity, memory);
      const int64_t n = width - column < Engine::kColumns ? width - column : Engine::kColumns;
      const Read read = l == 0 ? stream(level_.expert_inputs[e], column) : hidden(l, e, column, n, s.operand);
      weight_columns<Engine>(args_, chunk_, l, at, column, n, gradient, read.operand, read.ld, read.column, s.sums);
    }
    if (column == 0) whole_bias<Engine>(args_, chunk_, l, at, gradient);
  }

 private:
  int64_t columns(int l) const {
    const int64_t count = (level_.widths[l] + Engine::kColumns - 1) / Engine::kColumns;
    return count > 0 ? count : 1;
  }

  // Columns of an operand, from `column` on.
  struct Read {
    const Operand* operand;
    int64_t ld, column;
  };

  const T* stream_rows(int stream) const {
    return static_cast<const T*>(level_.inputs[stream]) + chunk_.row * level_.input_ld[stream];
  }
  Operand* stream_operand(int stream) const {
    return static_cast<Operand*>(chunk_.operands) + stream * Engine::operand_size(level_.widths[0], chunk_.capacity);
  }
  Read stream(int stream, int64_t column) const {
    const Operand* direct = Engine::direct_operand(stream_rows(stream), level_.widths[0]);
    if (direct) return {direct, level_.input_ld[stream], column};
    return {stream_operand(stream), Engine::rounded(level_.widths[0]), column};
  }

  // What one expert alone reads: these columns are made for this task.
  Read hidden(int l, int e, int64_t column, int64_t n, Operand* memory) const {
    const int64_t width = level_.widths[l];
    const T* rows = static_cast<const T*>(args_.saved[l - 1]) + (level_.numbers[e] * level_.rows + chunk_.row) * width;
    const bool activated = !from_input(level_.activations[l - 1]);
    const Operand* direct = activated ? Engine::direct_operand(rows, width) : nullptr;
    if (direct) return {direct, width, column};
    with_activation(activated ? static_cast<int>(kNone) : level_.activations[l - 1], [&](auto constant) {
      constexpr int kCode = decltype(constant)::value;
      if constexpr (kCode == kNone) {
        Engine::make_operand(rows + column, width, chunk_.rows, n, memory, Unchanged{});
      } else {
        Engine::make_operand(rows + column, width, chunk_.rows, n, memory,
                             [](C* values, int64_t count, int64_t, int64_t) {
                               for (int64_t i = 0; i < count; i += Simd<C>::lanes) {
                                 mtlk::MTLK_ISA::store(values + i, activate<kCode, C>(load(values + i)));
                               }
                             });
      }
    });
    return {memory, Engine::rounded(n), 0};
  }

  const ChainBackwardArgs& args_;
  const LevelShape& level_;
  const BackwardChunk& chunk_;
  const BackwardLayout<Engine>& layout_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
