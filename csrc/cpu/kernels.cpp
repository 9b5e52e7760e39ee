// Puts the kernels of one instruction set into the tables; CMakeLists.txt compiles this file once for each.

#include "cast/cast_kernels.h"
#include "gemm/engines.h"
#include "level/level_kernels.h"
#include "mixture/gated_mixture_kernels.h"
#include "pcgrad/pcgrad_kernels.h"
#include "snr/snr_aver_kernels.h"
#include "snr/snr_trans_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

// In level/chain_kernels.cpp and level/layerwise_kernels.cpp.
template <typename Engine>
ChainKernels chain_kernels(const EngineTable& engine);
template <typename Engine>
LayerwiseKernels layerwise_kernels(const EngineTable& engine);

// Of this instruction set and of those after it, until they put their own there.
template <typename K>
void put(int isa, Dtype dtype, const K& kernels) {
  for (; isa < kMaxInstructionSets; ++isa) KernelTable<K>::kernels[isa][static_cast<int>(dtype)] = kernels;
}

template <typename K>
void put_by_rows(int isa, Dtype dtype, const K& kernels, const K* few = nullptr) {
  const K& before = KernelTable<KernelsByRows<K>>::kernels[isa][static_cast<int>(dtype)].fewer;
  const K& fewer = kernels.engine.pays.call.rows == 0 ? kernels : before;
  put(isa, dtype, KernelsByRows<K>{kernels, fewer, few ? *few : fewer});
}

template <typename Engine>
void fill_dtype(int isa, Dtype dtype) {
  using T = typename Engine::T;
  const EngineTable engine = engine_table<Engine>();
  const ChainKernels few = chain_kernels<RowsEngine<T>>(engine_table<RowsEngine<T>>());
  put_by_rows(isa, dtype, chain_kernels<Engine>(engine), &few);
  put_by_rows(isa, dtype, layerwise_kernels<Engine>(engine));
  put_by_rows(isa, dtype, snr_trans_kernels<Engine>(engine));
  put(isa, dtype, snr_aver_kernels<T>());
  put(isa, dtype, gated_mixture_kernels<T>());
  put(isa, dtype, pcgrad_kernels<T>());
  if constexpr (sizeof(T) == 2) put(isa, dtype, cast_kernels<T>());
}

void fill(int isa) {
#define MTLK_FILL(dtype, ...) fill_dtype<__VA_ARGS__>(isa, Dtype::dtype);
  MTLK_ENGINES(MTLK_FILL)
}

}  // namespace MTLK_ISA
}  // namespace mtlk
