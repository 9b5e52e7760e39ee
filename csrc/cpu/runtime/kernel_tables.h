// Where the kernels of each instruction set stand.
#pragma once

#include <type_traits>

#include "common/dtypes.h"
#include "runtime/api.h"

namespace mtlk {

constexpr int kMaxInstructionSets = 6;

// Kernels of type K by instruction set, in rising order, and Dtype. csrc/cpu/kernels.cpp fills the tables: an
// instruction set has what those before it have, and its own on top.
template <typename K>
struct KernelTable {
  // What runs before main, and after a table was filled, must not make it anew.
  static_assert(std::is_trivially_default_constructible_v<K>);
  static inline K kernels[kMaxInstructionSets][kDtypes];
};

// The number of the instruction set that serves now: the best that this processor and this build have, unless
// select_isa chose another.
MTLK_API int selected_isa();

// Whether select_isa chose it.
MTLK_API bool isa_is_chosen();

template <typename K>
const K& kernels_for(Dtype dtype) {
  return KernelTable<K>::kernels[selected_isa()][static_cast<int>(dtype)];
}

}  // namespace mtlk
