// Instantiates the kernels of normalized_mixture for one instruction set; CMakeLists.txt compiles this file once for
// each.

#include "gemm/engines.h"
#include "level/level_kernels.h"
#include "level/normalized_weight_gradients.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
NormalizedMixtureKernels normalized_mixture_kernels() {
  using C = typename Engine::C;
  NormalizedMixtureKernels table{};
  table.forward_bytes = [](const Level& level, int64_t nrows) {
    return NormalizedForwardScratch<Engine>(level, group_count(nrows), nullptr).total;
  };
  table.layer = [](const NormalizedForwardArgs& args, int64_t block, int l, int first, int last, void* scratch) {
    Engine::begin();
    NormalizedForward<Engine>(args, block, scratch).layer(l, first, last);
    Engine::end();
  };
  table.mix = [](const NormalizedForwardArgs& args, int64_t block, int64_t part, int64_t parts, void* scratch) {
    NormalizedForward<Engine>(args, block, scratch).mix(part, parts);
  };
  table.combine_moments = combine_moments<C>;
  table.prepare = prepare_norm<C>;

  table.backward_bytes = [](const Level& level, int64_t nrows) {
    return NormalizedBackwardScratch<Engine>(level, group_count(nrows), nullptr).total;
  };
  table.inner_bytes = [](const Level& level, int64_t nrows) {
    return static_cast<int64_t>(level.gates.columns * group_count(nrows) * kGroup * sizeof(C));
  };
  table.below_bytes = [](const Level& level, int64_t nrows) {
    const int64_t groups = group_count(nrows);
    return static_cast<int64_t>(stream_count(level) * stream_sums<Engine>(level, groups) * sizeof(C));
  };
  table.gradient_bytes = [](const Level& level, int64_t chunk_rows) {
    int64_t most = 0;
    for (int l = 0; l < level.layers; ++l) {
      const int64_t size = level.experts * chunk_gradient_size<Engine>(level, l, chunk_rows);
      most = size > most ? size : most;
    }
    return most * static_cast<int64_t>(sizeof(typename Engine::Gradient));
  };
  table.weight_bytes = [](const Level& level, int64_t chunk_rows) {
    return WeightScratch<Engine>(level, chunk_rows, nullptr).total;
  };
  table.last_gradient = [](const NormalizedBackwardArgs& args, int64_t block, int first, int last, void* scratch,
                           void* inner) {
    NormalizedBackward<Engine>(args, block, scratch).last_gradient(first, last, static_cast<C*>(inner));
  };
  table.logit_gradient = [](const NormalizedBackwardArgs& args, int64_t block, void* scratch, const void* inner) {
    NormalizedBackward<Engine>(args, block, scratch).logit_gradient(static_cast<const C*>(inner));
  };
  table.combine_sums = combine_sums<C>;
  table.layer_gradient = [](const NormalizedBackwardArgs& args, const BackwardChunk& chunk, int64_t block, int l,
                            int first, int last, void* scratch, void* below) {
    Engine::begin();
    NormalizedBackward<Engine>(args, block, scratch).layer_gradient(chunk, l, first, last, static_cast<C*>(below));
    Engine::end();
  };
  table.reduce_input_gradients = [](const NormalizedBackwardArgs& args, int64_t block, void* scratch, const void* below,
                                    int parts, int64_t stride) {
    NormalizedBackward<Engine>(args, block, scratch)
        .reduce_input_gradients(static_cast<const C*>(below), parts, stride / static_cast<int64_t>(sizeof(C)));
  };
  table.weight_tasks = [](const NormalizedBackwardArgs& args, int l) {
    return NormalizedWeightGradients<Engine>(args, l).tasks();
  };
  table.weight_gradient = [](const NormalizedBackwardArgs& args, const BackwardChunk& chunk, int l, int64_t task,
                             void* scratch) {
    Engine::begin();
    NormalizedWeightGradients<Engine>(args, l).run(chunk, task, scratch);
    Engine::end();
  };
  return table;
}

#define MTLK_INSTANTIATE(dtype, ...) template NormalizedMixtureKernels normalized_mixture_kernels<__VA_ARGS__>();
MTLK_ENGINES(MTLK_INSTANTIATE)

}  // namespace MTLK_ISA
}  // namespace mtlk
