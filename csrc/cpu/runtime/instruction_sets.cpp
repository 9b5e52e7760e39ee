// Chooses the kernels for this processor, once.

#include "runtime/instruction_sets.h"

#include <algorithm>

#include "runtime/kernel_tables.h"

#if defined(MTLK_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mtlk {

#define MTLK_DECLARE(isa) \
  namespace isa {         \
  void fill(int isa);     \
  }

MTLK_DECLARE(baseline)
#if defined(MTLK_X86)
MTLK_DECLARE(avx2)
MTLK_DECLARE(avx512)
#if defined(MTLK_AVX512BF16)
MTLK_DECLARE(avx512bf16)
#endif
#if defined(MTLK_SPLIT)
MTLK_DECLARE(split)
#endif
#if defined(MTLK_AMX)
MTLK_DECLARE(amx)
#endif

static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#if defined(MTLK_AVX512BF16)
// Dot products of bfloat16 and conversions to it.
static bool has_avx512bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16) != 0;
}
#endif

#if defined(MTLK_AMX)
// AMX tiles with bfloat16, and the kernel's leave to use the tile registers.
static bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif

// Fills the tables in rising order.
static std::vector<std::string> fill_tables() {
  std::vector<std::string> names;
  const auto add = [&](const char* name, void (*fill)(int)) {
    fill(static_cast<int>(names.size()));
    names.emplace_back(name);
  };
  add("baseline", baseline::fill);
#if defined(MTLK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return names;
  add("avx2", avx2::fill);
  if (!has_avx512()) return names;
  add("avx512", avx512::fill);
#if defined(MTLK_AVX512BF16)
  if (!has_avx512bf16()) return names;
  add("avx512bf16", avx512bf16::fill);
#endif
#if defined(MTLK_AMX)
  if (has_amx()) add("amx", amx::fill);
#endif
#if defined(MTLK_SPLIT)
  add("split", split::fill);
#endif
#endif
  return names;
}

const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> names = fill_tables();
  return names;
}

const char* compiled_instruction_sets() { return MTLK_TARGETS; }

static int best_isa() {
  static const int isa = static_cast<int>(instruction_sets().size()) - 1;
  return isa;
}

static int chosen = -1;

int selected_isa() { return chosen < 0 ? best_isa() : chosen; }

bool isa_is_chosen() { return chosen >= 0; }

bool select_isa(const std::optional<std::string>& isa) {
  const auto& names = instruction_sets();
  const auto found = isa ? std::find(names.begin(), names.end(), *isa) : names.end();
  if (isa && found == names.end()) return false;
  chosen = isa ? static_cast<int>(found - names.begin()) : -1;
  return true;
}

}  // namespace mtlk
