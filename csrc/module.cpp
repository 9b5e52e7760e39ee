// The Python module _C: facts about the build, the instruction sets to choose from, and the direct way to a level.

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "below_autograd.h"
#include "casts.h"
#include "cpu/gemm/kept_weights.h"
#include "cpu/runtime/instruction_sets.h"
#include "cpu/runtime/kernel_tables.h"
#include "cpu/runtime/memory.h"
#include "direct.h"
#include "gradient_lists.h"
#include "graph.h"
#include "kept_level.h"
#include "level_node.h"
#include "linears.h"
#include "observers.h"
#include "recording.h"
#include "snapshot.h"
#include "snr_node.h"
#include "watch.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The direct way to the C++ kernels of mtlkernels";
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const c10::ValueError& refused) {
      pybind11::set_error(PyExc_ValueError, refused.what_without_backtrace());
    }
  });
  module.def("build_facts", [] {
    return std::map<std::string, std::string>{
        {"compiler", MTLK_COMPILER},
        {"torch", TORCH_VERSION},
        {"compiled for", mtlk::compiled_instruction_sets()},
        {"runs as", mtlk::instruction_sets()[mtlk::selected_isa()]},
    };
  });
  module.def("instruction_sets", &mtlk::instruction_sets, "The instruction sets that can serve here, the best last.");
  module.def("level", &mtlk::level_from_python,
             "mtlkernels.expert_mixture by the direct way: outputs, or None: not its call.");
  module.def("layerwise_level", &mtlk::layerwise_level_from_python,
             "The same with norms by the batch, dropout and slopes.");
  module.def("level_tensors", &mtlk::level_tensors_from_python,
             "The tensors of an expert_mixture in the operators' order, and whether a gradient is wanted; or None.");
  module.def("linears", &mtlk::linears_of_experts,
             "Weights and biases of experts of mtlkernels.nn, by layer, and whether these are all; or None.");
  module.def("recoded_level", &mtlk::recoded_level, "A LevelSpec's encoding, decoded and encoded again.");
  module.def(
      "release_memory",
      [] {
        mtlk::KeptWeights::instance().release();  // into the pool
        return mtlk::MemoryPool::instance().release();
      },
      "Lets go of the memory that the kernels keep for later calls; the number of bytes.");
  module.def("keep_prepared", &mtlk::keep_prepared_from_python,
             "Keeps what is prepared of each of these weights, which nobody writes to any more.");
  mtlk::find_observers();
  mtlk::define_below_autograd(module);
  mtlk::define_casts(module);
  mtlk::define_gradient_lists(module);
  mtlk::define_graph(module);
  mtlk::define_recording(module);
  mtlk::define_level_node(module);
  mtlk::define_kept_level(module);
  mtlk::define_kept_lists(module);
  mtlk::define_kept_trunk(module);
  mtlk::define_snapshot(module);
  mtlk::define_snr_node(module);
  mtlk::define_watch(module);
  module.def("select_isa", &mtlk::select_isa,
             "Serves with one of them, or, of None, by what pays; False if there is none of that name.");
}
