// The Python module mtlkernels._C: loading it registers the C++ kernels; it exposes facts about the build, the
// instruction sets to choose from, and a short way to serve.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/gemm/kept_weights.h"
#include "cpu/runtime/instruction_sets.h"
#include "cpu/runtime/kernel_tables.h"
#include "cpu/runtime/memory.h"
#include "serve.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels of mtlkernels";
  mtlk::selected_isa();  // tables are filled here, once and by one thread, and known to forks from now on
  mtlk::KeptWeights::instance();
  module.def("build_facts", [] {
    return std::map<std::string, std::string>{
        {"compiler", MTLK_COMPILER},
        {"torch", TORCH_VERSION},
        {"compiled for", MTLK_TARGETS},
        {"runs as", mtlk::instruction_sets()[mtlk::selected_isa()]},
    };
  });
  module.def("instruction_sets", &mtlk::instruction_sets, "The instruction sets that can serve here, the best last.");
  module.def("serve_expert_mixture", &mtlk::serve_expert_mixture_from_python,
             "mtlkernels.expert_mixture without gradients; ValueError or RuntimeError for what it does not take.");
  module.def(
      "release_memory",
      [] {
        mtlk::KeptWeights::instance().release();  // into the pool
        return mtlk::MemoryPool::instance().release();
      },
      "Lets go of the memory that the kernels keep for later calls; the number of bytes.");
  module.def("keep_prepared", &mtlk::keep_prepared_from_python,
             "Keeps what is prepared of each of these weights, which nobody writes to any more.");
  module.def("select_isa", &mtlk::select_isa, "Serves with one of them; False if there is none of that name.");
}
