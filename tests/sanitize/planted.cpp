// The faults of planted_faults.h in a process that has a build with a sanitizer loaded, whose pool they use; an
// operator, so that PyTorch is among the callers as it is of the kernels.
#include <torch/library.h>

#include "planted_faults.h"

TORCH_LIBRARY(mtlkernels_planted, m) {
  m.def("make(str name) -> bool", [](const std::string& name) { return planted::make(name); });
}
