// The operators expert_mixture and expert_level on CPUs: how a call is cut into blocks of rows and parts of experts.

#include "level/expert_mixture.h"

#include <ATen/record_function.h>
#include <torch/library.h>

#include "level/blocking.h"
#include "level/expert_mixture_backward_run.h"
#include "level/level_args.h"
#include "level/level_gradients.h"
#include "level/level_kernels.h"
#include "runtime/memory.h"

namespace mtlk {
namespace {

using Tensors = std::vector<at::Tensor>;

const LevelKernels& forward_kernels_for(const at::Tensor& inputs) {
  const auto& kernels = kernels_for<KernelsByRows<LevelKernels>>(dtype_of(inputs));
  return kernels.of(inputs.size(0), kernels.usual.expert_mixture.min_forward_rows);
}

void run_tiny(const ForwardArgs& args, const ExpertMixtureKernels& kernels) {
  const Level& level = args.level;
  const int parts = std::min(level.experts, at::get_num_threads());
  const Scratch scratch(parts, kernels.tiny_bytes(level));
  if (parts == 1) return kernels.tiny(args, 0, level.experts, scratch[0], nullptr);
  const int64_t mixed_bytes = kernels.tiny_mixed_bytes(level);
  const at::Tensor mixed = at::empty({parts * mixed_bytes}, at::kByte);
  char* sums = static_cast<char*>(mixed.mutable_data_ptr());
  parallel_threads(parts, [&](int64_t p) {
    const int part = static_cast<int>(p);
    kernels.tiny(args, part_begin(level, part, parts), part_begin(level, part + 1, parts), scratch[p],
                 sums + p * mixed_bytes);
  });
  kernels.tiny_finish(args, sums, parts, scratch[0]);
}

void run_blocks(const ForwardArgs& args, const ExpertMixtureKernels& kernels, const Cut& cut) {
  const Level& level = args.level;
  const bool save = args.saved != nullptr;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), cut.blocks * cut.parts);
  const Scratch scratch(threads, kernels.forward_bytes(level, cut.block_rows, save));
  const int64_t mixed_bytes = kernels.forward_mixed_bytes(level, cut.block_rows);
  at::Tensor mixed;
  char* sums = nullptr;
  if (cut.parts > 1) {
    mixed = at::empty({cut.blocks * cut.parts * mixed_bytes}, at::kByte);
    sums = static_cast<char*>(mixed.mutable_data_ptr());
  }
  const auto rows_of = [&](int64_t block) { return std::min(cut.block_rows, level.rows - block * cut.block_rows); };
  // The parts of a short last block lie as densely as those of a full one.
  const auto sums_of = [&](int64_t block, int64_t part) {
    return sums + block * cut.parts * mixed_bytes + part * kernels.forward_mixed_bytes(level, rows_of(block));
  };
  parallel_tasks_on(threads, cut.blocks * cut.parts, [&](int64_t task, int64_t thread) {
    const int64_t block = task / cut.parts;
    const int part = static_cast<int>(task % cut.parts);
    kernels.forward(args, block * cut.block_rows, rows_of(block), part_begin(level, part, cut.parts),
                    part_begin(level, part + 1, cut.parts), scratch[thread],
                    cut.parts > 1 ? sums_of(block, part) : nullptr, false);
  });
  if (cut.parts > 1) {
    parallel_tasks_on(threads, cut.blocks, [&](int64_t block, int64_t thread) {
      kernels.forward_finish(args, block * cut.block_rows, rows_of(block), sums_of(block, 0), cut.parts,
                             scratch[thread]);
    });
  }
}

// Evaluates a level whose gates `set_gates(form of the weights)` describes.
template <typename F>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> run_forward(LevelTables& tables, at::TensorList inputs,
                                                                         at::TensorList weights, bool save,
                                                                         F set_gates) {
  const Level& level = tables.level();
  const bool kept = !save && all_declared(weights);
  const LevelKernels& kernels = forward_kernels_for(inputs[0]);
  const EngineTable& engine = kernels.engine;
  const ExpertMixtureKernels& table = kernels.expert_mixture;
  const bool tiny = level.rows <= engine.tiny_rows;
  set_gates(tiny ? WeightForm::kNatural : engine.form);
  const auto options = inputs[0].options();
  std::vector<at::Tensor> outputs, saved;
  std::vector<void*> output_pointers, saved_pointers;
  for (int k = 0; k < level.gates.count; ++k) {
    outputs.push_back(pooled({level.rows, level.widths[level.layers]}, options));
    output_pointers.push_back(outputs.back().mutable_data_ptr());
  }
  for (int l = 0; save && l < saved_layers(level); ++l) {
    saved.push_back(pooled({level.experts, level.rows, level.widths[l + 1]}, options));
    saved_pointers.push_back(saved.back().mutable_data_ptr());
  }
  if (level.rows == 0) return {outputs, saved};
  const auto args = [&] { return ForwardArgs{level, output_pointers.data(), save ? saved_pointers.data() : nullptr}; };
  if (tiny) {
    tables.set_natural_weights(weights);
    run_tiny(args(), table);
    return {outputs, saved};
  }
  tables.set_forward_weights(weights, engine, kept);
  const int64_t bytes = table.forward_bytes(level, kMinBlockRows, save);
  const int64_t bytes_of_a_row = (table.forward_bytes(level, 2 * kMinBlockRows, save) - bytes) / kMinBlockRows;
  run_blocks(args(), table, Cut::of(level, engine.forward_block_bytes, bytes_of_a_row));
  return {outputs, saved};
}

std::tuple<Tensors, Tensors> forward(at::TensorList inputs, at::TensorList weights, const OptionalTensors& biases,
                                     at::TensorList gate_logits, at::IntArrayRef expert_inputs,
                                     at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes,
                                     at::IntArrayRef activations, bool save) {
  LevelTables tables(inputs, weights, expert_inputs, gate_experts, gate_sizes, activations);
  tables.set_biases(biases);
  return run_forward(tables, inputs, weights, save, [&](WeightForm) { tables.set_logits(gate_logits); });
}

void run_tiny_backward(const BackwardArgs& args, const ExpertMixtureKernels& table) {
  const Level& level = args.level;
  const int parts = std::min(level.experts, at::get_num_threads());
  const Scratch scratch(parts, table.tiny_backward_bytes(level));
  const int64_t below_bytes = table.tiny_below_bytes(level);
  const Scratch below(1, parts * below_bytes), inner(1, table.tiny_inner_bytes(level));
  char* const sums = static_cast<char*>(below[0]);
  parallel_threads(parts, [&](int64_t p) {
    const int part = static_cast<int>(p);
    table.tiny_backward(args, part_begin(level, part, parts), part_begin(level, part + 1, parts), scratch[p],
                        sums + p * below_bytes, inner[0]);
  });
  table.tiny_backward_finish(args, sums, parts, inner[0], scratch[0]);
}

void run_backward(BackwardArgs& args, LevelTables& tables, at::TensorList weights, const LevelKernels& kernels) {
  const EngineTable& engine = kernels.engine;
  const BackwardPlan plan = BackwardPlan::of(args, kernels);
  const int experts = args.level.experts;
  const bool again = saved_layers(args.level) < args.level.layers;
  std::vector<GroupForms*> used;
  std::optional<GroupForms> all, last;
  if (engine.form == WeightForm::kPrepared && plan.capacity >= args.level.rows) {
    if (args.need_chain()) {
      used.push_back(&all.emplace(weights, experts, engine, engine.backward_transposed));
      tables.set_weights(*all);
    }
    if (again) {
      used.push_back(&last.emplace(weights.slice(weights.size() - experts), experts, engine, false));
      args.last_weights = last->pointers();
      args.last_weight_ld = last->ld();
    }
  } else if (args.need_chain() || again) {
    tables.set_weights(weights, engine, engine.backward_transposed);
    if (again) tables.set_last_weights(weights, engine);
    args.last_weights = tables.last_weights();
    args.last_weight_ld = tables.last_weight_ld();
  }
  args.level = tables.level();
  BackwardRun(args, kernels.expert_mixture, plan, used).run();
}

Tensors of_list(const OptionalTensors& tensors) {
  Tensors result;
  for (size_t i = 0; i < tensors.size(); ++i) result.push_back(tensors.get(i).value_or(at::Tensor()));
  return result;
}

std::tuple<Tensors, Tensors, at::Tensor> level_forward(at::TensorList inputs, at::TensorList weights,
                                                       const OptionalTensors& biases, at::TensorList gate_weights,
                                                       const OptionalTensors& gate_biases,
                                                       at::IntArrayRef expert_inputs, at::IntArrayRef gate_experts,
                                                       at::IntArrayRef gate_sizes, at::IntArrayRef activations,
                                                       bool save) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  LevelTables tables(inputs, weights, expert_inputs, gate_experts, gate_sizes, activations);
  tables.set_biases(biases);
  at::Tensor logits;
  auto [outputs, saved] = run_forward(tables, inputs, weights, save, [&](WeightForm form) {
    if (save) {
      logits = tables.set_gate_products(inputs, gate_weights.vec(), of_list(gate_biases));
    } else {
      tables.set_gate_layers(inputs, gate_weights.vec(), of_list(gate_biases), {},
                             forward_kernels_for(inputs[0]).expert_mixture.fold_norm, form);
    }
  });
  if (!save) logits = at::empty({0, tables.level().gates.columns}, inputs[0].options());
  return {outputs, saved, logits};
}

std::tuple<Tensors, Tensors, Tensors, Tensors> backward(at::TensorList grad_outputs, at::TensorList inputs,
                                                        at::TensorList weights, const OptionalTensors& biases,
                                                        at::TensorList gate_logits, at::TensorList saved,
                                                        at::IntArrayRef expert_inputs, at::IntArrayRef gate_experts,
                                                        at::IntArrayRef gate_sizes, at::IntArrayRef activations,
                                                        bool need_inputs, bool need_weights, bool need_biases,
                                                        bool need_logits) {
  LevelTables tables(inputs, weights, expert_inputs, gate_experts, gate_sizes, activations);
  tables.set_biases(biases);
  tables.set_logits(gate_logits);
  const Level& level = tables.level();
  const LevelKernels& kernels = kernels_for<LevelKernels>(dtype_of(inputs[0]), inputs[0].size(0));
  tables.set_grad_outputs(grad_outputs);
  tables.set_saved(saved, saved_layers(level));
  const bool tiny = level.rows <= kernels.engine.tiny_rows;
  LevelGradients results(level, inputs, weights, gate_logits, kernels.engine, tiny, need_inputs, need_weights,
                         need_biases, need_logits);
  BackwardArgs args{};
  args.level = level;
  args.grad_outputs = tables.grad_outputs();
  args.grad_output_ld = tables.grad_output_ld();
  args.saved = tables.saved();
  results.point(args);
  if (level.rows == 0) {
    results.zero();
  } else if (tiny) {
    tables.set_natural_weights(weights);
    args.level = level;
    args.last_weights = tables.last_weights();
    args.last_weight_ld = tables.last_weight_ld();
    run_tiny_backward(args, kernels.expert_mixture);
  } else {
    run_backward(args, tables, weights, kernels);
  }
  return results.take();
}

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> level_backward(
    at::TensorList grad_outputs, at::TensorList inputs, at::TensorList weights, const OptionalTensors& biases,
    at::TensorList gate_weights, const at::Tensor& logits, at::TensorList saved, at::IntArrayRef expert_inputs,
    at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes, at::IntArrayRef activations, bool need_inputs,
    bool need_weights, bool need_biases, bool need_gate_weights, bool need_gate_biases) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(gate_weights.size() == gate_sizes.size(),
                    "mtlkernels: gate_weights must hold an entry for each of ", gate_sizes.size(), " gates, got ",
                    gate_weights.size());
  TORCH_CHECK_VALUE(inputs.size() == 1 || inputs.size() >= gate_sizes.size(),
                    "mtlkernels: there must be a stream for each of ", gate_sizes.size(), " gates, got ",
                    inputs.size());
  const bool need_logits = need_inputs || need_gate_weights || need_gate_biases;
  auto [grad_inputs, grad_weights, grad_biases, grad_logits] =
      backward(grad_outputs, inputs, weights, biases, logits.split_with_sizes(gate_sizes, 1), saved, expert_inputs,
               gate_experts, gate_sizes, activations, need_inputs, need_weights, need_biases, need_logits);
  GateGradients gates;
  if (need_logits) {
    gates = gate_gradients(inputs, gate_weights, grad_logits, grad_inputs, need_gate_weights, need_gate_biases);
  }
  return {grad_inputs, grad_weights, grad_biases, gates.weights, gates.biases};
}

}  // namespace

std::vector<at::Tensor> serve_expert_mixture(const ServeArgs& args) {
  RECORD_FUNCTION("mtlkernels::expert_mixture_serve", {});
  if (!args.slopes.empty()) return serve_with_slopes(args);
  LevelTables tables(args.inputs, args.weights, args.expert_inputs, args.gate_experts, args.gate_sizes,
                     args.activations);
  const FoldNorm fold = forward_kernels_for(args.inputs[0]).expert_mixture.fold_norm;
  tables.set_biases(args.biases);
  tables.set_norms(args.norms, fold);
  return std::get<0>(run_forward(tables, args.inputs, args.weights, false, [&](WeightForm form) {
    if (args.gate_weights.empty()) {
      tables.set_logits(args.gate_logits);
    } else {
      tables.set_gate_layers(args.inputs, args.gate_weights, args.gate_biases, args.gate_norms, fold, form);
    }
  }));
}

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("expert_mixture_forward", TORCH_FN(forward));
  m.impl("expert_mixture_backward", TORCH_FN(backward));
  m.impl("expert_level_forward", TORCH_FN(level_forward));
  m.impl("expert_level_backward", TORCH_FN(level_backward));
}

}  // namespace mtlk
