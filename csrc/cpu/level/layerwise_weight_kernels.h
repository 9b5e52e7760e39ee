// The weights' gradients of a layerwise level, with the batch as the depth of their product.
#pragma once

#include "level/layerwise_backward_kernels.h"
#include "level/weight_columns.h"

namespace mtlk {
namespace MTLK_ISA {

// The weights' gradients of one layer and a chunk of rows: tasks are an expert's runs of columns.
template <typename Engine>
class LayerwiseWeightGradients {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Gradient = typename Engine::Gradient;
  using Operand = typename Engine::Operand;

  LayerwiseWeightGradients(const LayerwiseBackwardArgs& args, int l) : args_(args), level_(args.level), l_(l) {}

  int64_t columns() const {
    const int64_t count = (level_.widths[l_] + Engine::kColumns - 1) / Engine::kColumns;
    return count > 0 ? count : 1;
  }
  int64_t tasks() const { return level_.experts * columns(); }

  void run(const BackwardChunk& chunk, int64_t task, void* memory) const {
    const int e = static_cast<int>(task / columns());
    const int64_t column = task % columns() * Engine::kColumns, width = level_.widths[l_];
    const int64_t at = static_cast<int64_t>(l_) * level_.experts + e;
    const Gradient* gradient =
        static_cast<const Gradient*>(chunk.gradients) + e * chunk_gradient_size<Engine>(level_, l_, chunk.capacity);
    if (args_.need_weights && column < width) {
      const int64_t n = width - column < Engine::kColumns ? width - column : Engine::kColumns;
      const WeightScratch<Engine> s(level_, chunk.capacity, memory);
      make_operand(chunk, e, column, n, s.operand);
      weight_columns<Engine>(args_, chunk, l_, at, column, n, gradient, s.operand, Engine::rounded(n), 0, s.sums);
    }
    if (column == 0 && args_.grad_biases[at]) {
      if (args_.layers[l_].norm == kBatchNorm) {
        unmoved_bias(at, e);
      } else {
        whole_bias<Engine>(args_, chunk, l_, at, gradient);
      }
    }
  }

 private:
  static constexpr int L = Simd<C>::lanes;

  // A constant does not move what a batch norm gives: zeros, and NaN where the gradients of the channel are.
  void unmoved_bias(int64_t at, int e) const {
    const NormLayer& layer = args_.layers[l_];
    const C* const slope = static_cast<const C*>(layer.grad_slope) + e * layer.ld;
    const C* const level = static_cast<const C*>(layer.grad_offset) + e * layer.ld;
    const C zero = 0;
    for (int64_t o = 0; o < level_.widths[l_ + 1]; ++o) {
      from_compute(slope[o] * zero + level[o] * zero, static_cast<T*>(args_.grad_biases[at]) + o);
    }
  }

  void make_operand(const BackwardChunk& chunk, int e, int64_t column, int64_t n, Operand* out) const {
    if (l_ == 0) {
      const int stream = level_.expert_inputs[e];
      const int64_t ld = level_.input_ld[stream];
      const T* rows = static_cast<const T*>(level_.inputs[stream]) + chunk.row * ld + column;
      return Engine::make_operand(rows, ld, chunk.rows, n, out, Unchanged{});
    }
    const LayerReader<T> reader(args_, l_ - 1, e);
    const T* rows = reader.rows(chunk.row) + column;
    with_any_activation(reader.code(), [&](auto constant) {
      constexpr int64_t kDrawn = 32;  // columns whose bits of two rows are drawn together
      uint32_t kept[(Engine::kColumns + kDrawn - 1) / kDrawn][2];
      Engine::make_operand(rows, reader.width(), chunk.rows, n, out,
                           [&](C* values, int64_t count, int64_t r, int64_t first) {
                             for (int64_t i = 0; i < count; i += kDrawn) {
                               const int64_t row = chunk.row + r, at = column + first + i;
                               uint32_t* const bits = kept[i / kDrawn];
                               if (reader.drops() && r % 2 == 0) reader.dropout().two_rows(row, at, bits);
                               read<decltype(constant)::value>(reader, row, at, count - i < kDrawn ? count - i : kDrawn,
                                                               reader.drops() ? bits + r % 2 : nullptr, values + i);
                             }
                           });
    });
  }

  // A row's features [column, column + n) as the layer above read them, in place.
  template <int Code>
  static void read(const LayerReader<T>& reader, int64_t row, int64_t column, int64_t n, const uint32_t* kept,
                   C* values) {
    const NormLayer& layer = reader.layer();
    const C *factor = nullptr, *shift = nullptr;
    if (layer.norm != kNoNorm) {
      factor = reader.channels(layer.factor) + column;
      shift = reader.channels(layer.shift) + column;
    }
    const C by = reader.scale();
    Vector<C> mean{}, rate{};
    if constexpr (Code == kDice) {
      mean = broadcast(reader.per_row(layer.gate_mean)[row]);
      rate = broadcast(reader.per_row(layer.gate_rate)[row]);
    }
    for (int64_t i = 0; i < n; i += L) {
      Vector<C> x = load(values + i);
      if (layer.norm == kBatchNorm) {
        x = (x - load(reader.channels(layer.center) + column + i)) * load(factor + i) + load(shift + i);
      } else if (layer.norm == kLayerNorm) {
        x = (x - reader.means()[row]) * reader.per_row(layer.rstd)[row] * load(factor + i) + load(shift + i);
      }
      if constexpr (Code == kPrelu || Code == kDice) {
        x = activate_with_slope<Code, C>(x, load(reader.channels(layer.activation_slope) + column + i), mean, rate);
      } else {
        x = activate<Code, C>(x);
      }
      mtlk::MTLK_ISA::store(values + i, kept ? kept_lanes<C>(x, *kept >> i, by) : x);
    }
  }

  const LayerwiseBackwardArgs& args_;
  const LevelShape& level_;
  const int l_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
