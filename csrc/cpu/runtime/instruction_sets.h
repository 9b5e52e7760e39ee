// The choice among the instruction sets that kernels are compiled for.
#pragma once

#include <string>
#include <vector>

namespace mtlk {

// The instruction sets that this processor and this build have, the best last.
const std::vector<std::string>& instruction_sets();

// Serves with one of them, for tests and measurements; false if there is none of that name. Not to be called while an
// operator runs.
bool select_isa(const std::string& isa);

}  // namespace mtlk
