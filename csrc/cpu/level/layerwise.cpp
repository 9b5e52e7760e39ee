// How a layerwise call is cut into layers, blocks of rows and parts of experts.

#include "level/layerwise.h"

#include <limits>

#include "level/blocking.h"
#include "level/norm_tables.h"
#include "runtime/parallel.h"

namespace mtlk {
namespace {

// f(expert) for all of them, for work that is small.
template <typename F>
void each_expert(const LevelShape& level, F f) {
  parallel_tasks(at::get_num_threads(), level.experts, [&](int64_t e) { f(static_cast<int>(e)); });
}

int64_t partial_ld(const LevelShape& level) {
  const int64_t widest = *std::max_element(level.widths + 1, level.widths + level.layers + 1);
  return divide_up(widest, 32) * 32;
}

// Values of the compute type for each block, expert, array and channel.
Scratch partials_for(const LayerwiseArgs& args) {
  const int64_t values = args.blocks * args.level.experts * args.partial_arrays * args.partial_ld;
  return {1, values * static_cast<int64_t>(sizeof(double))};
}

void run_forward(LayerwiseForwardArgs& args, const LayerwiseKernels& kernels) {
  const LevelShape& level = args.level;
  const int64_t threads = at::get_num_threads();
  const int64_t bytes = kernels.forward_bytes(level, kMinBlockRows);
  const int64_t bytes_of_a_row = (kernels.forward_bytes(level, 2 * kMinBlockRows) - bytes) / kMinBlockRows;
  const Cut cut = Cut::of(level, kernels.engine.forward_block_bytes, bytes_of_a_row);
  args.block_rows = cut.block_rows;
  args.blocks = cut.blocks;
  args.partial_ld = partial_ld(level);
  const Scratch partials = partials_for(args);
  args.partials = partials[0];
  const Scratch scratch(threads, kernels.forward_bytes(level, cut.block_rows));
  for (int l = 0; l < level.layers; ++l) {
    parallel_tasks_on(threads, cut.blocks * cut.parts, [&](int64_t task, int64_t thread) {
      const int part = static_cast<int>(task % cut.parts);
      kernels.layer(args, task / cut.parts, l, part_begin(level, part, cut.parts),
                    part_begin(level, part + 1, cut.parts), scratch[thread]);
    });
    if (args.layers[l].norm == kNoNorm && !args.layers[l].activation_slope) continue;
    each_expert(level, [&](int e) {
      if (args.layers[l].norm == kBatchNorm) kernels.combine_moments(args, l, e);
      kernels.prepare(args, l, e);
    });
  }
  parallel_tasks_on(threads, cut.blocks * cut.parts, [&](int64_t task, int64_t thread) {
    kernels.mix(args, task / cut.parts, task % cut.parts, cut.parts, scratch[thread]);
  });
}

// The gradients dz of layer l, a chunk of rows at a time, and what follows from them.
void run_layer(const LayerwiseBackwardArgs& args, const LayerwiseKernels& kernels, int l, int64_t capacity, int parts,
               const Scratch& scratch, const Scratch& gradients, const Scratch& sums) {
  const LevelShape& level = args.level;
  const int64_t threads = at::get_num_threads();
  const bool sums_inputs = l == 0 && args.grad_inputs && parts > 1;
  const int64_t below_bytes = sums_inputs ? kernels.below_bytes(level, args.block_rows) : 0;
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
      kernels.layer_gradient(args, chunk, first + block, l, part_begin(level, part, parts),
                             part_begin(level, part + 1, parts), scratch[thread], inputs);
    });
    if (sums_inputs) {
      parallel_tasks_on(threads, blocks, [&](int64_t block, int64_t thread) {
        kernels.reduce_input_gradients(args, first + block, scratch[thread], below[block], parts, below_bytes);
      });
    }
    if (args.need_weights || args.need_biases) {
      parallel_tasks_on(threads, kernels.weight_tasks(args, l), [&](int64_t task, int64_t thread) {
        kernels.weight_gradient(args, chunk, l, task, sums[thread]);
      });
    }
  }
}

void run_backward(LayerwiseBackwardArgs& args, const LayerwiseKernels& kernels) {
  const LevelShape& level = args.level;
  const int64_t threads = at::get_num_threads();
  const int64_t fitting = chunk_rows(level, kernels.engine);
  args.block_rows =
      block_rows(fitting, kernels.engine.block_bytes, kernels.backward_bytes(level, kMinBlockRows) / kMinBlockRows);
  args.blocks = divide_up(level.rows, args.block_rows);
  const int64_t capacity = divide_up(fitting, args.block_rows) * args.block_rows;
  const int parts = parts_of(level, std::min(args.blocks, capacity / args.block_rows));
  args.partial_ld = partial_ld(level);
  const Scratch partials = partials_for(args);
  args.partials = partials[0];
  const Scratch scratch(threads, kernels.backward_bytes(level, args.block_rows));
  const Scratch inner(args.blocks, kernels.inner_bytes(level, args.block_rows));
  each_expert(level, [&](int e) {
    for (int l = 0; l < level.layers; ++l) kernels.prepare(args, l, e);
  });
  parallel_tasks_on(threads, args.blocks * parts, [&](int64_t task, int64_t thread) {
    const int part = static_cast<int>(task % parts);
    kernels.last_gradient(args, task / parts, part_begin(level, part, parts), part_begin(level, part + 1, parts),
                          scratch[thread], inner[task / parts]);
  });
  if (args.grad_logits) {
    parallel_tasks_on(threads, args.blocks, [&](int64_t block, int64_t thread) {
      kernels.logit_gradient(args, block, scratch[thread], inner[block]);
    });
  }
  if (!args.need_experts) return;
  const Scratch gradients(1, kernels.gradient_bytes(level, capacity));
  const Scratch sums(threads, kernels.weight_bytes(level, capacity));
  for (int l = level.layers - 1; l >= 0; --l) {
    if (args.layers[l].norm != kNoNorm || args.layers[l].activation_slope) {
      each_expert(level, [&](int e) { kernels.combine_sums(args, l, e); });
    }
    run_layer(args, kernels, l, capacity, parts, scratch, gradients, sums);
  }
}

// What both directions hand to the kernels.
void point(LayerwiseArgs& args, const LevelShape& level, NormTables& norms) {
  args.level = level;
  args.layers = norms.layers();
  args.partial_arrays = norms.partial_arrays();
  args.seed = norms.seed();
}

}  // namespace

LevelResults layerwise_forward(const LevelSpec& spec, const LevelTensors& tensors, LevelTables& tables,
                               const LayerwiseKernels& kernels, const RunningNorms& norms,
                               const std::optional<at::Tensor>& seed, bool save) {
  const LevelShape& level = tables.level();
  tables.set_logits(tensors.gates);
  NormTables norm_tables(spec, level, tensors, seed);
  const auto options = tensors.inputs[0].options();
  Tensors outputs, before;
  std::vector<void*> output_pointers;
  for (int k = 0; k < level.gates.count; ++k) {
    outputs.push_back(pooled({level.rows, level.widths[level.layers]}, options));
    output_pointers.push_back(outputs.back().mutable_data_ptr());
  }
  for (int l = 0; l < level.layers; ++l) {
    before.push_back(pooled({level.experts, level.rows, level.widths[l + 1]}, options));
    norm_tables.layers()[l].z = before.back().mutable_data_ptr();
  }
  const Tensors statistics = norm_tables.make_statistics();
  if (level.rows == 0) {
    for (const at::Tensor& tensor : statistics) tensor.fill_(std::numeric_limits<double>::quiet_NaN());  // of nothing
  } else {
    if (level.rows <= kFewRows) {
      tables.set_natural_weights();
    } else {
      tables.set_forward_weights(kernels.engine, all_declared(tensors.weights));
    }
    norm_tables.allocate(false);
    LayerwiseForwardArgs args{};
    point(args, level, norm_tables);
    args.outputs = output_pointers.data();
    run_forward(args, kernels);
  }
  if (!save) before.clear();
  before.insert(before.end(), statistics.begin(), statistics.end());
  return {std::move(outputs), std::move(before)};
}

void layerwise_backward(const LevelSpec& spec, const LevelTensors& tensors, LevelTables& tables,
                        const LayerwiseKernels& kernels, at::TensorList statistics, int64_t experts,
                        const std::optional<at::Tensor>& seed, LevelGradients& gradients) {
  const LevelShape& level = tables.level();
  NormTables norm_tables(spec, level, tensors, seed);
  norm_tables.set_statistics(statistics, experts);
  gradients.point(norm_tables.layers());
  if (level.rows == 0) return gradients.zero();
  LayerwiseBackwardArgs args{};
  gradients.point(args);
  if (!args.need_experts && !args.grad_logits) return;
  for (int l = 0; l < level.layers; ++l) {
    norm_tables.layers()[l].z = const_cast<void*>(tables.saved()[l]);  // the backward pass only reads it
  }
  if (args.need_experts && level.rows <= kFewRows) {
    tables.set_natural_weights();
  } else if (args.need_experts) {
    tables.set_backward_weights(kernels.engine);
  }
  norm_tables.allocate(true);
  point(args, level, norm_tables);
  args.grad_outputs = tables.grad_outputs();
  args.grad_output_ld = tables.grad_output_ld();
  run_backward(args, kernels);
}

}  // namespace mtlk
