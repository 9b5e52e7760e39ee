// Which instruction sets csrc/cpu/runtime/instruction_sets.cpp finds on the processor that runs this; no kernels.

#include <cstdio>

#include "../../csrc/cpu/runtime/instruction_sets.cpp"

#define MTLK_NO_KERNELS(isa) \
  void mtlk::isa::fill(int) {}
MTLK_NO_KERNELS(baseline)
MTLK_NO_KERNELS(avx2)
MTLK_NO_KERNELS(avx512)
MTLK_NO_KERNELS(avx512bf16)
MTLK_NO_KERNELS(amx)

int main() {
  const auto& names = mtlk::instruction_sets();
  for (const std::string& name : names) std::printf("%s ", name.c_str());
  std::printf("%s\n", names[mtlk::selected_isa()].c_str());
}
