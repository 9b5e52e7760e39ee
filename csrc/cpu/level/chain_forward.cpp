#include <ATen/ops/empty.h>

#include "level/blocking.h"
#include "level/chain.h"
#include "runtime/caches.h"
#include "runtime/parallel.h"

namespace mtlk {
namespace {

void run(const ChainForwardArgs& args, const ChainKernels& kernels) {
  const LevelShape& level = args.level;
  const bool save = args.saved != nullptr;
  const int64_t bytes = kernels.forward_bytes(level, kMinBlockRows, save);
  const int64_t bytes_of_a_row = (kernels.forward_bytes(level, 2 * kMinBlockRows, save) - bytes) / kMinBlockRows;
  const Cut cut = Cut::of(level, kernels.engine.forward_block_bytes, bytes_of_a_row);
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
                    cut.parts > 1 ? sums_of(block, part) : nullptr);
  });
  if (cut.parts > 1) {
    parallel_tasks_on(threads, cut.blocks, [&](int64_t block, int64_t thread) {
      kernels.forward_finish(args, block * cut.block_rows, rows_of(block), sums_of(block, 0), cut.parts,
                             scratch[thread]);
    });
  }
}

Tensors outputs_of(const LevelShape& level, const at::TensorOptions& options, std::vector<void*>& pointers) {
  Tensors outputs;
  for (int k = 0; k < level.gates.count; ++k) {
    outputs.push_back(pooled({level.rows, level.widths[level.layers]}, options));
    pointers.push_back(outputs.back().mutable_data_ptr());
  }
  return outputs;
}

}  // namespace

Tensors serve_chain(const LevelShape& level, const at::TensorOptions& options, const ChainKernels& kernels) {
  std::vector<void*> pointers;
  Tensors outputs = outputs_of(level, options, pointers);
  if (level.rows > 0) run({level, pointers.data(), nullptr, nullptr, nullptr, false}, kernels);
  return outputs;
}

LevelResults chain_forward(const LevelTensors& tensors, LevelTables& tables, const ChainKernels& kernels,
                           const RunningNorms& norms, const SavedShape& shape, bool save) {
  const LevelShape& level = tables.level();
  tensors.linear_gates ? tables.set_gate_layers(norms.gates, kernels) : tables.set_logits(tensors.gates);
  const auto options = tensors.inputs[0].options();
  LevelResults results;
  if (!save) {
    if (level.rows > 0) tables.set_forward_weights(kernels.engine, all_declared(tensors.weights));
    results.outputs = serve_chain(level, options, kernels);
    return results;
  }
  std::vector<void*> outputs, saved;
  int64_t bytes = 0;  // of activations
  results.outputs = outputs_of(level, options, outputs);
  for (int l = 0; l < level.layers; ++l) {
    const std::vector<int64_t> sizes = shape.sizes(l, level.rows, level.widths[l + 1]);
    if (sizes[0] == 0) continue;
    results.saved.push_back(pooled(sizes, options));
    saved.push_back(results.saved.back().mutable_data_ptr());
    bytes += static_cast<int64_t>(results.saved.back().nbytes());
  }
  uint8_t* signs = nullptr;
  if (shape.signs) {
    const int64_t others = shape.experts - shape.last_experts, width = sign_bytes(level.widths[level.layers]);
    results.saved.push_back(pooled({others, level.rows, width}, options.dtype(at::kByte)));
    signs = results.saved.back().mutable_data_ptr<uint8_t>();
  }
  void* logits = nullptr;
  if (tensors.linear_gates) {
    results.saved.push_back(pooled({level.rows, level.gates.columns}, options));
    logits = results.saved.back().mutable_data_ptr();
  }
  if (level.rows == 0) return results;
  tables.set_forward_weights(kernels.engine, false);
  run({level, outputs.data(), saved.data(), signs, logits, bytes >= cached_bytes()}, kernels);
  return results;
}

}  // namespace mtlk
