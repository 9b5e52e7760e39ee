// The operator normalized_mixture on CPUs: how a call is cut into layers, blocks of rows and parts of experts.

#include <torch/library.h>

#include <limits>

#include "level/blocking.h"
#include "level/expert_mixture.h"
#include "level/level_args.h"
#include "level/level_gradients.h"
#include "level/level_kernels.h"
#include "level/norm_tables.h"
#include "runtime/memory.h"

namespace mtlk {
namespace {

const LevelKernels& level_kernels_for(const at::Tensor& inputs) {
  return kernels_for<LevelKernels>(dtype_of(inputs), inputs.size(0));
}

// Few rows, which are multiplied with weights as they are.
bool tiny(const Level& level, const EngineTable& engine) { return level.rows <= engine.tiny_rows; }

// f(expert) for all of them, for work that is small.
template <typename F>
void each_expert(const Level& level, F f) {
  parallel_tasks(at::get_num_threads(), level.experts, [&](int64_t e) { f(static_cast<int>(e)); });
}

int64_t partial_ld(const Level& level) {
  const int64_t widest = *std::max_element(level.widths + 1, level.widths + level.layers + 1);
  return divide_up(widest, 32) * 32;
}

// Values of the compute type for each block, expert, array and channel.
Scratch partials_for(const NormalizedArgs& args) {
  const int64_t values = args.blocks * args.level.experts * args.partial_arrays * args.partial_ld;
  return {1, values * static_cast<int64_t>(sizeof(double))};
}

void run_forward(NormalizedForwardArgs& args, const LevelKernels& kernels) {
  const Level& level = args.level;
  const int64_t threads = at::get_num_threads();
  const int64_t bytes = kernels.normalized_mixture.forward_bytes(level, kMinBlockRows);
  const int64_t bytes_of_a_row =
      (kernels.normalized_mixture.forward_bytes(level, 2 * kMinBlockRows) - bytes) / kMinBlockRows;
  const Cut cut = Cut::of(level, kernels.engine.forward_block_bytes, bytes_of_a_row);
  args.block_rows = cut.block_rows;
  args.blocks = cut.blocks;
  args.partial_ld = partial_ld(level);
  const Scratch partials = partials_for(args);
  args.partials = partials[0];
  const Scratch scratch(threads, kernels.normalized_mixture.forward_bytes(level, cut.block_rows));
  for (int l = 0; l < level.layers; ++l) {
    parallel_tasks_on(threads, cut.blocks * cut.parts, [&](int64_t task, int64_t thread) {
      const int part = static_cast<int>(task % cut.parts);
      kernels.normalized_mixture.layer(args, task / cut.parts, l, part_begin(level, part, cut.parts),
                                       part_begin(level, part + 1, cut.parts), scratch[thread]);
    });
    if (args.layers[l].norm == kNoNorm && !args.layers[l].activation_slope) continue;
    each_expert(level, [&](int e) {
      if (args.layers[l].norm == kBatchNorm) kernels.normalized_mixture.combine_moments(args, l, e);
      kernels.normalized_mixture.prepare(args, l, e);
    });
  }
  parallel_tasks_on(threads, cut.blocks * cut.parts, [&](int64_t task, int64_t thread) {
    kernels.normalized_mixture.mix(args, task / cut.parts, task % cut.parts, cut.parts, scratch[thread]);
  });
}

using Tensors = std::vector<at::Tensor>;

// Outputs, pre-activations, means and variances.
std::tuple<Tensors, Tensors, Tensors, Tensors> forward_of(LevelTables& tables, NormTables& norm_tables,
                                                          at::TensorList weights, const at::Tensor& like) {
  const Level& level = tables.level();
  const auto options = like.options();
  Tensors outputs, saved, means, variances;
  std::vector<void*> output_pointers;
  for (int k = 0; k < level.gates.count; ++k) {
    outputs.push_back(pooled({level.rows, level.widths[level.layers]}, options));
    output_pointers.push_back(outputs.back().mutable_data_ptr());
  }
  for (int l = 0; l < level.layers; ++l) {
    NormLayer& layer = norm_tables.layers()[l];
    saved.push_back(pooled({level.experts, level.rows, level.widths[l + 1]}, options));
    layer.z = saved.back().mutable_data_ptr();
    if (!norm_tables.has_norm(l)) continue;
    for (auto [tensors, pointer] : {std::pair{&means, &layer.mean}, {&variances, &layer.variance}}) {
      tensors->push_back(at::empty(norm_tables.statistic_sizes(l), options.dtype(norm_tables.compute())));
      *pointer = tensors->back().mutable_data_ptr();
    }
  }
  if (level.rows == 0) {
    for (Tensors* tensors : {&means, &variances}) {  // of nothing
      for (const at::Tensor& tensor : *tensors) tensor.fill_(std::numeric_limits<double>::quiet_NaN());
    }
    return {outputs, saved, means, variances};
  }
  const LevelKernels& kernels = level_kernels_for(like);
  if (tiny(level, kernels.engine)) {
    tables.set_natural_weights(weights);
  } else {
    tables.set_forward_weights(weights, kernels.engine, all_declared(weights));
  }
  norm_tables.allocate(false);
  NormalizedForwardArgs args{};
  args.level = level;
  args.layers = norm_tables.layers();
  args.partial_arrays = norm_tables.partial_arrays();
  args.seed = norm_tables.seed();
  args.outputs = output_pointers.data();
  run_forward(args, kernels);
  return {outputs, saved, means, variances};
}

std::tuple<Tensors, Tensors, Tensors, Tensors> forward(
    at::TensorList inputs, at::TensorList weights, const OptionalTensors& biases, const OptionalTensors& scales,
    const OptionalTensors& shifts, const OptionalTensors& slopes, at::TensorList gate_logits,
    at::IntArrayRef expert_inputs, at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes,
    at::IntArrayRef activations, at::IntArrayRef norms, at::ArrayRef<double> eps, at::ArrayRef<double> dice_eps,
    at::ArrayRef<double> dropout, const std::optional<at::Tensor>& seed) {
  LevelTables tables(inputs, weights, expert_inputs, gate_experts, gate_sizes, activations);
  tables.set_biases(biases);
  tables.set_logits(gate_logits);
  NormTables norm_tables(tables.level(), inputs[0].scalar_type(), norms, eps, dice_eps, dropout, seed, scales, shifts,
                         slopes);
  return forward_of(tables, norm_tables, weights, inputs[0]);
}

// The gradients dz of layer l, a chunk of rows at a time, and what follows from them.
void run_layer(const NormalizedBackwardArgs& args, const LevelKernels& kernels, int l, int64_t capacity, int parts,
               const Scratch& scratch, const Scratch& gradients, const Scratch& sums) {
  const Level& level = args.level;
  const int64_t threads = at::get_num_threads();
  const bool sums_inputs = l == 0 && args.grad_inputs && parts > 1;
  const int64_t below_bytes = sums_inputs ? kernels.normalized_mixture.below_bytes(level, args.block_rows) : 0;
  const int64_t chunk_blocks = capacity / args.block_rows;
  const Scratch below(std::min(chunk_blocks, args.blocks), parts * below_bytes);
  for (int64_t first = 0; first < args.blocks; first += chunk_blocks) {
    const int64_t blocks = std::min(chunk_blocks, args.blocks - first), row = first * args.block_rows;
    const BackwardChunk chunk{row,    std::min(capacity, level.rows - row), capacity, 0, level.experts, gradients[0],
                              nullptr};
    parallel_tasks_on(threads, blocks * parts, [&](int64_t task, int64_t thread) {
      const int64_t block = task / parts;
      const int part = static_cast<int>(task % parts);
      char* const inputs = sums_inputs ? static_cast<char*>(below[block]) + part * below_bytes : nullptr;
      kernels.normalized_mixture.layer_gradient(args, chunk, first + block, l, part_begin(level, part, parts),
                                                part_begin(level, part + 1, parts), scratch[thread], inputs);
    });
    if (sums_inputs) {
      parallel_tasks_on(threads, blocks, [&](int64_t block, int64_t thread) {
        kernels.normalized_mixture.reduce_input_gradients(args, first + block, scratch[thread], below[block], parts,
                                                          below_bytes);
      });
    }
    if (args.need_weights || args.need_biases) {
      parallel_tasks_on(threads, kernels.normalized_mixture.weight_tasks(args, l), [&](int64_t task, int64_t thread) {
        kernels.normalized_mixture.weight_gradient(args, chunk, l, task, sums[thread]);
      });
    }
  }
}

void run_backward(NormalizedBackwardArgs& args, const LevelKernels& kernels) {
  const Level& level = args.level;
  const int64_t threads = at::get_num_threads();
  const int64_t fitting = chunk_rows(level, kernels.engine);
  args.block_rows = block_rows(fitting, kernels.engine.block_bytes,
                               kernels.normalized_mixture.backward_bytes(level, kMinBlockRows) / kMinBlockRows);
  args.blocks = divide_up(level.rows, args.block_rows);
  const int64_t capacity = divide_up(fitting, args.block_rows) * args.block_rows;
  const int parts = parts_of(level, std::min(args.blocks, capacity / args.block_rows));
  args.partial_ld = partial_ld(level);
  const Scratch partials = partials_for(args);
  args.partials = partials[0];
  const Scratch scratch(threads, kernels.normalized_mixture.backward_bytes(level, args.block_rows));
  const Scratch inner(args.blocks, kernels.normalized_mixture.inner_bytes(level, args.block_rows));
  each_expert(level, [&](int e) {
    for (int l = 0; l < level.layers; ++l) kernels.normalized_mixture.prepare(args, l, e);
  });
  parallel_tasks_on(threads, args.blocks * parts, [&](int64_t task, int64_t thread) {
    const int part = static_cast<int>(task % parts);
    kernels.normalized_mixture.last_gradient(args, task / parts, part_begin(level, part, parts),
                                             part_begin(level, part + 1, parts), scratch[thread], inner[task / parts]);
  });
  if (args.grad_logits) {
    parallel_tasks_on(threads, args.blocks, [&](int64_t block, int64_t thread) {
      kernels.normalized_mixture.logit_gradient(args, block, scratch[thread], inner[block]);
    });
  }
  if (!args.need_chain) return;
  const Scratch gradients(1, kernels.normalized_mixture.gradient_bytes(level, capacity));
  const Scratch sums(threads, kernels.normalized_mixture.weight_bytes(level, capacity));
  for (int l = level.layers - 1; l >= 0; --l) {
    if (args.layers[l].norm != kNoNorm || args.layers[l].activation_slope) {
      each_expert(level, [&](int e) { kernels.normalized_mixture.combine_sums(args, l, e); });
    }
    run_layer(args, kernels, l, capacity, parts, scratch, gradients, sums);
  }
}

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> backward(
    at::TensorList grad_outputs, at::TensorList inputs, at::TensorList weights, const OptionalTensors& scales,
    const OptionalTensors& shifts, const OptionalTensors& slopes, at::TensorList gate_logits, at::TensorList saved,
    at::TensorList means, at::TensorList variances, at::IntArrayRef expert_inputs, at::IntArrayRef gate_experts,
    at::IntArrayRef gate_sizes, at::IntArrayRef activations, at::IntArrayRef norms, at::ArrayRef<double> eps,
    at::ArrayRef<double> dice_eps, at::ArrayRef<double> dropout, const std::optional<at::Tensor>& seed,
    bool need_inputs, bool need_weights, bool need_biases, bool need_norms, bool need_slopes, bool need_logits) {
  LevelTables tables(inputs, weights, expert_inputs, gate_experts, gate_sizes, activations);
  tables.set_logits(gate_logits);
  const Level& level = tables.level();
  tables.set_grad_outputs(grad_outputs);
  tables.set_saved(saved, level.layers);
  NormTables norm_tables(level, inputs[0].scalar_type(), norms, eps, dice_eps, dropout, seed, scales, shifts, slopes);
  norm_tables.set_statistics(means, variances);
  norm_tables.set_gradients(need_norms, need_slopes);
  const LevelKernels& kernels = level_kernels_for(inputs[0]);
  LevelGradients results(level, inputs, weights, gate_logits, kernels.engine, false, need_inputs, need_weights,
                         need_biases, need_logits);
  NormalizedBackwardArgs args{};
  results.point(args);
  args.need_chain = need_inputs || need_weights || need_biases || need_norms || need_slopes;
  for (int l = 0; l < level.layers; ++l) {
    norm_tables.layers()[l].z = const_cast<void*>(tables.saved()[l]);  // the backward pass only reads it
    if (norms[l] == kBatchNorm) results.zero_biases(static_cast<size_t>(l) * level.experts, level.experts);
  }
  if (level.rows == 0) {
    results.zero();
  } else {
    if (args.need_chain && tiny(level, kernels.engine)) {
      tables.set_natural_weights(weights);
    } else if (args.need_chain) {
      tables.set_weights(weights, kernels.engine, kernels.engine.backward_transposed);
    }
    norm_tables.allocate(true);
    args.level = level;
    args.layers = norm_tables.layers();
    args.partial_arrays = norm_tables.partial_arrays();
    args.seed = norm_tables.seed();
    args.grad_outputs = tables.grad_outputs();
    args.grad_output_ld = tables.grad_output_ld();
    run_backward(args, kernels);
  }
  auto [grad_inputs, grad_weights, grad_biases, grad_logits] = results.take();
  return {grad_inputs,
          grad_weights,
          grad_biases,
          norm_tables.take_grad_scales(),
          norm_tables.take_grad_shifts(),
          norm_tables.take_grad_slopes(),
          grad_logits};
}

}  // namespace

std::vector<at::Tensor> serve_with_slopes(const ServeArgs& args) {
  LevelTables tables(args.inputs, args.weights, args.expert_inputs, args.gate_experts, args.gate_sizes,
                     args.activations);
  const FoldNorm fold = level_kernels_for(args.inputs[0]).expert_mixture.fold_norm;
  tables.set_biases(args.biases);
  tables.set_norms(args.norms, fold);
  if (args.gate_weights.empty()) {
    tables.set_logits(args.gate_logits);
  } else {
    tables.set_gate_layers(args.inputs, args.gate_weights, args.gate_biases, args.gate_norms, fold,
                           WeightForm::kPrepared);
  }
  const size_t layers = args.activations.size();
  const std::vector<int64_t> no_norms(layers, kNoNorm);
  const std::vector<double> zeros(layers, 0.0);
  OptionalTensors slopes;
  for (const at::Tensor& slope : args.slopes) {
    slopes.push_back(slope.defined() ? std::optional<at::Tensor>(slope) : std::nullopt);
  }
  OptionalTensors nothing;
  for (size_t i = 0; i < args.weights.size(); ++i) nothing.push_back(std::optional<at::Tensor>());
  NormTables norm_tables(tables.level(), args.inputs[0].scalar_type(), no_norms, zeros, args.dice_eps, zeros,
                         std::nullopt, nothing, nothing, slopes);
  return std::get<0>(forward_of(tables, norm_tables, args.weights, args.inputs[0]));
}

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("normalized_mixture_forward", TORCH_FN(forward));
  m.impl("normalized_mixture_backward", TORCH_FN(backward));
}

}  // namespace mtlk
