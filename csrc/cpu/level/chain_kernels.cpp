// Instantiates the chain's kernels for one instruction set; CMakeLists.txt compiles this file once for each.

#include "gemm/engines.h"
#include "level/chain_weight_kernels.h"
#include "level/level_kernels.h"
#include "level/tiny_backward_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
void forward(const ChainForwardArgs& args, int64_t row, int64_t nrows, int first, int last, void* scratch, void* mixed,
             bool add) {
  using C = typename Engine::C;
  Engine::begin();
  ChainForward<Engine> block(args, row, nrows, scratch);
  block.run(first, last);
  if (mixed) {
    C* const sums = static_cast<C*>(mixed);
    if (!add) std::memset(sums, 0, block.mixed_size() * sizeof(C));
    for (int64_t i = 0; i < block.mixed_size(); i += Simd<C>::lanes) {
      store(sums + i, load(sums + i) + load(block.mixed() + i));
    }
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

template <typename T>
void tiny(const ChainForwardArgs& args, int first, int last, void* scratch, void* mixed) {
  TinyForward<T> forward(args, scratch);
  forward.run(first, last);
  if (mixed) {
    std::memcpy(mixed, forward.mixed(), TinyForward<T>::mixed_size(args.level) * sizeof(Compute<T>));
  } else {
    forward.finish(forward.mixed(), 1, 0);
  }
}

template <typename T>
void tiny_finish(const ChainForwardArgs& args, const void* mixed, int parts, void* scratch) {
  TinyForward<T>(args, scratch)
      .finish(static_cast<const Compute<T>*>(mixed), parts, TinyForward<T>::mixed_size(args.level));
}

template <typename Engine>
void backward(const ChainBackwardArgs& args, const BackwardChunk& chunk, int64_t row, int64_t nrows, int first,
              int last, void* scratch, void* below, void* inner, bool add) {
  using C = typename Engine::C;
  Engine::begin();
  const BackwardLayout<Engine> layout{args.level, chunk.capacity, chunk.last - chunk.first};
  ChainBackward<Engine> block(args, chunk, layout, row, nrows, scratch);
  block.run(first, last, static_cast<C*>(below), static_cast<C*>(inner), add);
  Engine::end();
}

template <typename Engine>
void backward_finish(const ChainBackwardArgs& args, const BackwardChunk& chunk, int64_t row, int64_t nrows,
                     const void* below, int parts, void* inner, void* scratch) {
  using C = typename Engine::C;
  const BackwardLayout<Engine> layout{args.level, chunk.capacity, chunk.last - chunk.first};
  ChainBackward<Engine>(args, chunk, layout, row, nrows, scratch)
      .finish(static_cast<const C*>(below), parts, static_cast<C*>(inner));
}

// f(the weights' gradients of a chunk, their layout in scope).
template <typename Engine, typename F>
auto with_weight_gradients(const ChainBackwardArgs& args, const BackwardChunk& chunk, F f) {
  const BackwardLayout<Engine> layout{args.level, chunk.capacity, chunk.last - chunk.first};
  return f(ChainWeightGradients<Engine>(args, chunk, layout));
}

template <typename Engine>
ChainKernels chain_kernels() {
  using T = typename Engine::T;
  using C = typename Engine::C;
  ChainKernels table{};
  table.fold_norm = fold_norm<T, C>;
  table.min_forward_rows = Engine::kMinForwardRows;
  table.forward_bytes = [](const LevelShape& level, int64_t nrows, bool save) {
    return ChainForwardScratch<Engine>(level, group_count(nrows), save, nullptr).total;
  };
  table.forward_mixed_bytes = [](const LevelShape& level, int64_t nrows) {
    return static_cast<int64_t>(level.gates.count * group_count(nrows) * kGroup * level.widths[level.layers] *
                                sizeof(C));
  };
  table.forward = forward<Engine>;
  table.forward_finish = forward_finish<Engine>;
  table.tiny_bytes = TinyForward<T>::bytes;
  table.tiny_mixed_bytes = [](const LevelShape& level) {
    return static_cast<int64_t>(TinyForward<T>::mixed_size(level) * sizeof(C));
  };
  table.tiny = tiny<T>;
  table.tiny_finish = tiny_finish<T>;

  table.backward_bytes = [](const LevelShape& level, int64_t nrows) {
    return ChainBackwardScratch<Engine>(level, group_count(nrows), nullptr).total;
  };
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
  table.backward_below_bytes = [](const LevelShape& level, int64_t nrows) {
    return static_cast<int64_t>(stream_sums<Engine>(level, group_count(nrows)) * sizeof(C));
  };
  table.backward_inner_bytes = [](const LevelShape& level, int64_t nrows) {
    return static_cast<int64_t>(level.gates.columns * group_count(nrows) * kGroup * sizeof(C));
  };
  table.backward = backward<Engine>;
  table.backward_finish = backward_finish<Engine>;
  table.tiny_backward_bytes = TinyBackward<T>::bytes;
  table.tiny_below_bytes = [](const LevelShape& level) {
    return static_cast<int64_t>(TinyBackward<T>::below_size(level) * sizeof(C));
  };
  table.tiny_inner_bytes = [](const LevelShape& level) {
    return static_cast<int64_t>(TinyBackward<T>::inner_size(level) * sizeof(C));
  };
  table.tiny_backward = [](const ChainBackwardArgs& args, int first, int last, void* scratch, void* below,
                           void* inner) {
    TinyBackward<T>(args, scratch).run(first, last, static_cast<C*>(below), static_cast<C*>(inner));
  };
  table.tiny_backward_finish = [](const ChainBackwardArgs& args, const void* below, int parts, const void* inner,
                                  void* scratch) {
    TinyBackward<T>(args, scratch).finish(static_cast<const C*>(below), parts, static_cast<const C*>(inner));
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
  return table;
}

#define MTLK_INSTANTIATE(dtype, ...) template ChainKernels chain_kernels<__VA_ARGS__>();
MTLK_ENGINES(MTLK_INSTANTIATE)

}  // namespace MTLK_ISA
}  // namespace mtlk
