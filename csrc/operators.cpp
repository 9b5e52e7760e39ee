// What is done when the library is loaded: it defines the operators, where Python has not defined them before.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <sstream>
#include <string>

#include "cpu/gemm/kept_weights.h"
#include "cpu/runtime/forks.h"
#include "cpu/runtime/kernel_tables.h"
#include "schemas.h"

TORCH_LIBRARY_FRAGMENT(mtlkernels, m) {
  mtlk::selected_isa();  // tables are filled here, once and by one thread, and known to forks from now on
  mtlk::KeptWeights::instance();
  mtlk::let_threads_go_before_forks();
  std::istringstream schemas(mtlk::kSchemas);
  for (std::string schema; std::getline(schemas, schema);) {
    const std::string name = "mtlkernels::" + schema.substr(0, schema.find('('));
    if (!c10::Dispatcher::singleton().findSchema({name, ""})) m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  }
}
