// What the tasks of the weights' gradients have in common: each adds a chunk's products to a run of columns of one
// weight.
#pragma once

#include "level/level_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// A thread's memory for a task.
template <typename Engine>
struct WeightScratch {
  typename Engine::Operand* operand;  // of kColumns features
  typename Engine::C* sums;           // of kColumns columns
  int64_t total;

  WeightScratch(const LevelShape& level, int64_t chunk_rows, void* memory) {
    int64_t widest = 0;
    for (int l = 1; l <= level.layers; ++l) widest = level.widths[l] > widest ? level.widths[l] : widest;
    Arena arena(memory);
    operand = arena.take<typename Engine::Operand>(Engine::operand_size(Engine::kColumns, chunk_rows));
    sums = arena.take<typename Engine::C>(widest * Engine::kColumns);
    total = arena.taken();
  }
};

template <typename Args>
bool completes(const Args& args, const BackwardChunk& chunk) {
  return chunk.row + chunk.rows == args.level.rows;
}

// Columns [column, column + n) of weight number `at`, of layer l: the gradients of its outputs against columns of what
// it read, from operand_column on. The last chunk writes the result; the only one needs no sums but `spare`.
template <typename Engine, typename Args>
void weight_columns(const Args& args, const BackwardChunk& chunk, int l, int64_t at, int64_t column, int64_t n,
                    const typename Engine::Gradient* gradient, const typename Engine::Operand* operand,
                    int64_t operand_ld, int64_t operand_column, typename Engine::C* spare) {
  using C = typename Engine::C;
  const int64_t outputs = args.level.widths[l + 1], width = args.level.widths[l];
  C* const sums = static_cast<C*>(args.weight_sums[at]);
  C* const first = sums ? sums + column : spare;
  const int64_t ld = sums ? args.weight_sum_ld[l] : Engine::kColumns;
  const bool is_result = args.grad_weights[at] == sums, past = args.weights_past_caches;
  const Leave leave = chunk.row > 0 ? Leave::kAdd : is_result && past ? Leave::kPastCaches : Leave::kSet;
  Engine::weight_gradient(gradient, outputs, operand, operand_ld, chunk.rows, operand_column, n, first, ld, leave);
  if (is_result || !completes(args, chunk)) return;
  auto* const result = static_cast<typename Engine::T*>(args.grad_weights[at]) + column;
  if (past && can_go_past_caches(result, width) && n % kPerVector<typename Engine::T> == 0) {
    for (int64_t o = 0; o < outputs; ++o) narrow_past_caches(first + o * ld, result + o * width, n);
    fence_past_caches();
  } else {
    for (int64_t o = 0; o < outputs; ++o) narrow(first + o * ld, result + o * width, n);
  }
}

// The same for the bias, where it is asked for.
template <typename Engine, typename Args>
void whole_bias(const Args& args, const BackwardChunk& chunk, int l, int64_t at,
                const typename Engine::Gradient* gradient) {
  using C = typename Engine::C;
  const int64_t outputs = args.level.widths[l + 1];
  C* const sums = static_cast<C*>(args.bias_sums[at]);
  if (!sums) return;
  Engine::bias_gradient(gradient, outputs, chunk.rows, sums, chunk.row > 0);
  void* const result = args.grad_biases[at];
  if (result != sums && completes(args, chunk)) narrow(sums, static_cast<typename Engine::T*>(result), outputs);
}

}  // namespace MTLK_ISA
}  // namespace mtlk
