// Instantiates the kernels for one instruction set; CMakeLists.txt compiles this file once for each.

#include "runtime/kernels.h"

#include "level/chain_weight_kernels.h"
#include "level/tiny_backward_kernels.h"
#include "mixture/gated_mixture_kernels.h"
#include "pcgrad/pcgrad_kernels.h"
#include "snr/snr_aver_kernels.h"
#include "snr/snr_trans_kernels.h"
#if defined(__AVX512BF16__)
#include "gemm/pair_engine.h"
#else
#include "gemm/plain_engine.h"
#endif

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
EngineTable engine_table() {
  using T = typename Engine::T;
  EngineTable table{};
  table.min_call_rows = Engine::kMinCallRows;
  table.min_forward_rows = Engine::kMinForwardRows;
  table.tiny_rows = kTinyRows;
  table.form = Engine::kForm;
  table.natural_outputs = Engine::kNaturalOutputs;
  if constexpr (Engine::kForm == WeightForm::kPrepared) {
    table.prepared_bytes = [](int64_t outputs, int64_t inputs) {
      return Engine::prepared_size(outputs, inputs) * static_cast<int64_t>(sizeof(typename Engine::Weight));
    };
    table.prepare = [](const void* weight, int64_t row_stride, int64_t column_stride, int64_t outputs, int64_t inputs,
                       void* prepared) {
      Engine::prepare(static_cast<const T*>(weight), row_stride, column_stride, outputs, inputs,
                      static_cast<typename Engine::Weight*>(prepared));
    };
  }
  table.backward_transposed = Engine::kBackwardTransposed;
  table.block_bytes = Engine::kBlockBytes;
  table.forward_block_bytes = Engine::kForwardBlockBytes;
  table.chunk_bytes = Engine::kChunkBytes;
  table.weight_sum_multiple = Engine::kSumMultiple;
  table.gradient_bytes_each = Engine::kGradientBytes;
  table.stores_compute = __is_same(T, typename Engine::C);
  return table;
}

template <typename Engine>
ChainKernels chain_kernels() {
  using T = typename Engine::T;
  using C = typename Engine::C;
  ChainKernels table{};
  table.fold_norm = fold_norm<T, C>;
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

template <typename T, typename Engine>
void fill_dtype(Kernels& table, Dtype dtype) {
  const int i = static_cast<int>(dtype);
  table.engines[i].engine = engine_table<Engine>();
  table.engines[i].chain = chain_kernels<Engine>();
  table.engines[i].snr_trans = snr_trans_kernels<Engine>();
  table.gated_mixture[i] = gated_mixture_kernels<T>();
  table.pcgrad[i] = pcgrad_kernels<T>();
  table.snr_aver[i] = snr_aver_kernels<T>();
}

void fill_layerwise(Kernels& table);  // in layerwise_kernels.cpp

// Puts this instruction set's kernels into a table.
void fill(Kernels& table) {
  table.isa = MTLK_ISA_NAME;
#if defined(__AVX512BF16__)
  fill_dtype<BFloat16, PairEngine<BFloat16>>(table, Dtype::kBFloat16);
#if defined(__AMX_BF16__) || defined(MTLK_SPLIT)
  fill_dtype<float, PairEngine<float>>(table, Dtype::kFloat32);
  fill_dtype<Half, PairEngine<Half>>(table, Dtype::kFloat16);
#endif
#else
  fill_dtype<float, PlainEngine<float>>(table, Dtype::kFloat32);
  fill_dtype<double, PlainEngine<double>>(table, Dtype::kFloat64);
  fill_dtype<BFloat16, PlainEngine<BFloat16>>(table, Dtype::kBFloat16);
  fill_dtype<Half, PlainEngine<Half>>(table, Dtype::kFloat16);
#endif
  fill_layerwise(table);
  for (int i = 0; i < 4; ++i) {  // an instruction set that has none for few rows keeps those of the set before
    if (table.engines[i].engine.min_call_rows == 0) table.engines_of_few_rows[i] = table.engines[i];
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
