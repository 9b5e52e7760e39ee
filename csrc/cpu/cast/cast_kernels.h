// Casts of one instruction set.
#pragma once

#include "cast/cast_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename T>
CastKernels cast_kernels() {
  CastKernels table{};
  table.narrow = [](const float* in, void* out, int64_t n) {
    T* const values = static_cast<T*>(out);
    if constexpr (__is_same(T, BFloat16)) {
      // By integers: the processor's own instruction makes zeros of subnormal numbers.
      for (int64_t i = 0; i < n; ++i) from_compute(in[i], values + i);
    } else {
      MTLK_ISA::narrow(in, values, n);
    }
  };
  table.widen = [](const void* in, float* out, int64_t n) { MTLK_ISA::widen(static_cast<const T*>(in), out, n); };
  return table;
}

}  // namespace MTLK_ISA
}  // namespace mtlk
