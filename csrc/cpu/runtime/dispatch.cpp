// Chooses the kernels for this processor, once.

#include "runtime/kernels.h"

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

// The tables in rising order: each has what the one before has, and its own on top.
static std::vector<Kernels> make_tables() {
  std::vector<Kernels> tables;
  const auto add = [&](void (*fill)(Kernels&)) {
    tables.push_back(tables.empty() ? Kernels{} : tables.back());
    fill(tables.back());
  };
  add(baseline::fill);
#if defined(MTLK_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return tables;
  add(avx2::fill);
  if (!has_avx512()) return tables;
  add(avx512::fill);
#if defined(MTLK_AVX512BF16)
  if (!has_avx512bf16()) return tables;
  add(avx512bf16::fill);
#endif
#if defined(MTLK_AMX)
  if (has_amx()) add(amx::fill);
#endif
#if defined(MTLK_SPLIT)
  add(split::fill);
#endif
#endif
  return tables;
}

static const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> made = make_tables();
  return made;
}

static const Kernels*& selected() {
  static const Kernels* table = &tables().back();
  return table;
}

const Kernels& kernels() { return *selected(); }

const EngineKernels& engine_for(Dtype dtype, int64_t rows, int64_t EngineTable::* min_rows) {
  const auto i = static_cast<int>(dtype);
  const EngineKernels& usual = kernels().engines[i];
  return rows < usual.engine.*min_rows ? kernels().engines_of_few_rows[i] : usual;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& table : tables()) names.emplace_back(table.isa);
  return names;
}

bool select_isa(const std::string& isa) {
  for (const Kernels& table : tables()) {
    if (isa != table.isa) continue;
    selected() = &table;
    return true;
  }
  return false;
}

}  // namespace mtlk
