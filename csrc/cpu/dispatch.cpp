// Chooses the kernels for this processor, once.

#include "kernels.h"

namespace mtlk {

#define MTLK_DECLARE(isa)  \
  namespace isa {          \
  Kernels make_kernels();  \
  }

MTLK_DECLARE(baseline)
#if defined(MTLK_X86)
MTLK_DECLARE(avx2)
MTLK_DECLARE(avx512)
#endif

static Kernels choose() {
#if defined(MTLK_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return avx512::make_kernels();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::make_kernels();
#endif
  return baseline::make_kernels();
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace mtlk
