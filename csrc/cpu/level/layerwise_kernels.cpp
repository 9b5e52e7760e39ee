// Instantiates the layerwise kernels for one instruction set; CMakeLists.txt compiles this file once for each.

#include "gemm/engines.h"
#include "level/layerwise_weight_kernels.h"
#include "level/level_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
LayerwiseKernels layerwise_kernels(const EngineTable& engine) {
  using C = typename Engine::C;
  LayerwiseKernels table{};
  table.engine = engine;
  table.fold_norm = fold_norm<typename Engine::T, C>;
  table.forward_bytes = [](const LevelShape& level, int64_t nrows) {
    return LayerwiseForwardScratch<Engine>(level, group_count(nrows), nullptr).total;
  };
  table.layer = [](const LayerwiseForwardArgs& args, int64_t block, int l, int first, int last, void* scratch) {
    Engine::begin();
    LayerwiseForward<Engine>(args, block, scratch).layer(l, first, last);
    Engine::end();
  };
  table.mix = [](const LayerwiseForwardArgs& args, int64_t block, int64_t part, int64_t parts, void* scratch) {
    LayerwiseForward<Engine>(args, block, scratch).mix(part, parts);
  };
  table.combine_moments = combine_moments<C>;
  table.prepare = prepare_norm<C>;

  table.backward_bytes = [](const LevelShape& level, int64_t nrows) {
    return LayerwiseBackwardScratch<Engine>(level, group_count(nrows), nullptr).total;
  };
  table.inner_bytes = [](const LevelShape& level, int64_t nrows) {
    return static_cast<int64_t>(level.gates.columns * group_count(nrows) * kGroup * sizeof(C));
  };
  table.below_bytes = [](const LevelShape& level, int64_t nrows) {
    const int64_t groups = group_count(nrows);
    return static_cast<int64_t>(stream_count(level) * stream_sums<Engine>(level, groups) * sizeof(C));
  };
  table.gradient_bytes = [](const LevelShape& level, int64_t chunk_rows) {
    int64_t most = 0;
    for (int l = 0; l < level.layers; ++l) {
      const int64_t size = level.experts * chunk_gradient_size<Engine>(level, l, chunk_rows);
      most = size > most ? size : most;
    }
    return most * static_cast<int64_t>(sizeof(typename Engine::Gradient));
  };
  table.weight_bytes = [](const LevelShape& level, int64_t chunk_rows) {
    return WeightScratch<Engine>(level, chunk_rows, nullptr).total;
  };
  table.last_gradient = [](const LayerwiseBackwardArgs& args, int64_t block, int first, int last, void* scratch,
                           void* inner) {
    LayerwiseBackward<Engine>(args, block, scratch).last_gradient(first, last, static_cast<C*>(inner));
  };
  table.logit_gradient = [](const LayerwiseBackwardArgs& args, int64_t block, void* scratch, const void* inner) {
    LayerwiseBackward<Engine>(args, block, scratch).logit_gradient(static_cast<const C*>(inner));
  };
  table.combine_sums = combine_sums<C>;
  table.layer_gradient = [](const LayerwiseBackwardArgs& args, const BackwardChunk& chunk, int64_t block, int l,
                            int first, int last, void* scratch, void* below) {
    Engine::begin();
    LayerwiseBackward<Engine>(args, block, scratch).layer_gradient(chunk, l, first, last, static_cast<C*>(below));
    Engine::end();
  };
  table.reduce_input_gradients = [](const LayerwiseBackwardArgs& args, int64_t block, void* scratch, const void* below,
                                    int parts, int64_t stride) {
    LayerwiseBackward<Engine>(args, block, scratch)
        .reduce_input_gradients(static_cast<const C*>(below), parts, stride / static_cast<int64_t>(sizeof(C)));
  };
  table.weight_tasks = [](const LayerwiseBackwardArgs& args, int l) {
    return LayerwiseWeightGradients<Engine>(args, l).tasks();
  };
  table.weight_gradient = [](const LayerwiseBackwardArgs& args, const BackwardChunk& chunk, int l, int64_t task,
                             void* scratch) {
    Engine::begin();
    LayerwiseWeightGradients<Engine>(args, l).run(chunk, task, scratch);
    Engine::end();
  };
  return table;
}

#define MTLK_INSTANTIATE(dtype, ...) template LayerwiseKernels layerwise_kernels<__VA_ARGS__>(const EngineTable&);
MTLK_ENGINES(MTLK_INSTANTIATE)

}  // namespace MTLK_ISA
}  // namespace mtlk
