// The choice among the instruction sets that kernels are compiled for.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "runtime/api.h"

namespace mtlk {

// The instruction sets that this processor and this build have, the best last.
MTLK_API const std::vector<std::string>& instruction_sets();

// All that were compiled, one word each.
MTLK_API const char* compiled_instruction_sets();

// Serves with one of them, for tests and measurements, and with its best kernels for layers of any width; with none,
// by what pays again. False if there is none of that name. Not to be called while an operator runs.
MTLK_API bool select_isa(const std::optional<std::string>& isa);

}  // namespace mtlk
