// The engines of an instruction set: one for each storage type for which it has a better one than those before it.
#pragma once

#if defined(__AVX512BF16__)
#include "gemm/pair_engine.h"
#else
#include "gemm/plain_engine.h"
#endif
#include "gemm/rows_engine.h"

// X(name of the Dtype, engine) for each of them.
#if !defined(__AVX512BF16__)
#define MTLK_ENGINES(X)               \
  X(kFloat32, PlainEngine<float>)     \
  X(kFloat64, PlainEngine<double>)    \
  X(kBFloat16, PlainEngine<BFloat16>) \
  X(kFloat16, PlainEngine<Half>)
#elif defined(__AMX_BF16__) || defined(MTLK_SPLIT)
#define MTLK_ENGINES(X)              \
  X(kBFloat16, PairEngine<BFloat16>) \
  X(kFloat32, PairEngine<float>)     \
  X(kFloat16, PairEngine<Half>)
#else
#define MTLK_ENGINES(X) X(kBFloat16, PairEngine<BFloat16>)
#endif

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
EngineTable engine_table() {
  using T = typename Engine::T;
  EngineTable table{};
  table.pays = Engine::kPays;
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
  table.sums_as_stored = Engine::kSumsAsStored;
  table.from_signs = Engine::kFromSigns;
  return table;
}

}  // namespace MTLK_ISA
}  // namespace mtlk
