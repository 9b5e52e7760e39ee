// Instantiates the chain's kernels for one instruction set; CMakeLists.txt compiles this file once for each.

#include "gemm/engines.h"
#include "level/chain_rows_backward_kernels.h"
#include "level/chain_weight_kernels.h"
#include "level/gate_gradient_kernels.h"
#include "level/level_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
void forward(const ChainForwardArgs& args, int64_t row, int64_t nrows, int first, int last, void* scratch,
             void* mixed) {
  Engine::begin();
  ChainForward<Engine> block(args, row, nrows, scratch);
  block.run(first, last);
  if (mixed) {
    std::memcpy(mixed, block.mixed(), block.mixed_size() * sizeof(typename Engine::C));
  } else {
    block.finish(block.mixed(), 1, 0);
  }
  Engine::end();
}

template <typename Engine>
void forward_finish(const ChainForwardArgs& args, int64_t row, int64_t nrows, const void* mixed, int parts,
                    void* scratch) {
  using C = typename Engine::C;
  ChainForward<Engine> block(args, row, nrows, scratch);
  block.finish(static_cast<const C*>(mixed), parts, block.mixed_size());
}

template <typename Engine>
void backward(const ChainBackwardArgs& args, const BackwardChunk& chunk, int64_t row, int64_t nrows, int first,
              int last, void* scratch, const BackwardPart& part) {
  Engine::begin();
  const BackwardLayout<Engine> layout{args.level, chunk.capacity, chunk.last - chunk.first};
  ChainBackward<Engine>(args, chunk, layout, row, nrows, scratch).run(first, last, part);
  Engine::end();
}

template <typename Engine>
void backward_finish(const ChainBackwardArgs& args, const BackwardChunk& chunk, int64_t row, int64_t nrows,
                     const BackwardPart& first, int parts, void* scratch) {
  const BackwardLayout<Engine> layout{args.level, chunk.capacity, chunk.last - chunk.first};
  ChainBackward<Engine>(args, chunk, layout, row, nrows, scratch).finish(first, parts);
}

// f(the weights' gradients of a chunk, their layout in scope).
template <typename Engine, typename F>
auto with_weight_gradients(const ChainBackwardArgs& args, const BackwardChunk& chunk, F f) {
  const BackwardLayout<Engine> layout{args.level, chunk.capacity, chunk.last - chunk.first};
  return f(ChainWeightGradients<Engine>(args, chunk, layout));
}

// What makes the gradients of weights and biases from a chunk's.
template <typename Engine>
void add_weight_kernels(ChainKernels& table) {
  table.gradient_bytes = [](const LevelShape& level, int64_t chunk_rows, int experts) {
    return BackwardLayout<Engine>{level, chunk_rows, experts}.gradients() *
           static_cast<int64_t>(sizeof(typename Engine::Gradient));
  };
  table.operand_bytes = [](const LevelShape& level, int64_t chunk_rows) {
    return stream_count(level) * Engine::operand_size(level.widths[0], chunk_rows) *
           static_cast<int64_t>(sizeof(typename Engine::Operand));
  };
  table.weight_bytes = [](const LevelShape& level, int64_t chunk_rows) {
    return WeightScratch<Engine>(level, chunk_rows, nullptr).total;
  };
  table.operand_tasks = [](const ChainBackwardArgs& args) { return static_cast<int64_t>(stream_count(args.level)); };
  table.make_operand = [](const ChainBackwardArgs& args, const BackwardChunk& chunk, int64_t task) {
    with_weight_gradients<Engine>(args, chunk, [&](const auto& grads) { grads.make_stream(static_cast<int>(task)); });
  };
  table.weight_tasks = [](const ChainBackwardArgs& args, const BackwardChunk& chunk) {
    return with_weight_gradients<Engine>(args, chunk, [](const auto& grads) { return grads.tasks(); });
  };
  table.weight_gradient = [](const ChainBackwardArgs& args, const BackwardChunk& chunk, int64_t task, void* scratch) {
    Engine::begin();
    with_weight_gradients<Engine>(args, chunk, [&](const auto& grads) { grads.run(task, scratch); });
    Engine::end();
  };
}

template <typename T>
GateKernels gate_kernels() {
  using Gradients = GateGradients<T>;
  GateKernels table{};
  table.features = Gradients::kFeatures;
  table.joined_bytes = [](int columns) {
    return Gradients::joined_ld(columns) * static_cast<int64_t>(sizeof(Compute<T>));
  };
  table.gradient_bytes = [](int columns) { return Gradients::bytes(columns); };
  table.join = Gradients::join;
  table.gradient = [](const GateGradientArgs& args, int64_t feature, void* scratch) {
    Gradients(args, feature, scratch).run();
  };
  table.biases = Gradients::biases;
  return table;
}

template <typename Engine>
ChainKernels chain_kernels(const EngineTable& engine) {
  using T = typename Engine::T;
  using C = typename Engine::C;
  ChainKernels table{};
  table.engine = engine;
  table.fold_norm = fold_norm<T, C>;
  table.gates = gate_kernels<T>();
  table.forward_bytes = ChainForward<Engine>::bytes;
  table.forward_mixed_bytes = [](const LevelShape& level, int64_t nrows) {
    return ChainForward<Engine>::mixed_size(level, nrows) * static_cast<int64_t>(sizeof(C));
  };
  table.forward = forward<Engine>;
  table.forward_finish = forward_finish<Engine>;

  table.backward_bytes = ChainBackward<Engine>::bytes;
  table.backward_gates_bytes = ChainBackward<Engine>::gates_bytes;
  table.backward_below_bytes = [](const LevelShape& level, int64_t nrows) {
    return ChainBackward<Engine>::stream_size(level, nrows) * static_cast<int64_t>(sizeof(C));
  };
  table.backward_inner_bytes = [](const LevelShape& level, int64_t nrows) {
    return level.gates.columns * padded_to_group(nrows) * static_cast<int64_t>(sizeof(C));
  };
  table.backward = backward<Engine>;
  table.backward_finish = backward_finish<Engine>;
  if constexpr (!__is_same(Engine, RowsEngine<T>)) add_weight_kernels<Engine>(table);
  return table;
}

#define MTLK_INSTANTIATE(dtype, ...)                                    \
  template ChainKernels chain_kernels<__VA_ARGS__>(const EngineTable&); \
  template ChainKernels chain_kernels<RowsEngine<__VA_ARGS__::T>>(const EngineTable&);
MTLK_ENGINES(MTLK_INSTANTIATE)

}  // namespace MTLK_ISA
}  // namespace mtlk
