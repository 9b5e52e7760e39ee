// Chooses the kernels for this processor, once.

#include "kernels.h"

#if defined(MTLK_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mtlk {

#define MTLK_DECLARE(isa) \
  namespace isa {         \
  void fill(Kernels&);    \
  }

MTLK_DECLARE(baseline)
#if defined(MTLK_X86)
MTLK_DECLARE(avx2)
MTLK_DECLARE(avx512)
#if defined(MTLK_AMX)
MTLK_DECLARE(amx)
#endif

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#if defined(MTLK_AMX)
// AMX tiles with bfloat16, AVX-512 conversions to bfloat16, and the kernel's leave to use the tile registers.
static bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kAvx512Bf16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif

static Kernels choose() {
  Kernels table{};
  baseline::fill(table);
#if defined(MTLK_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    avx2::fill(table);
    if (has_avx512()) {
      avx512::fill(table);
#if defined(MTLK_AMX)
      if (has_amx()) amx::fill(table);
#endif
    }
  }
#endif
  return table;
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace mtlk
