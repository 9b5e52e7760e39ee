// The operator expert_mixture on CPUs: how a call is cut into blocks of rows and parts of experts.

#include <torch/library.h>

#include "level_args.h"

namespace mtlk {
namespace {

// A block's intermediates should stay in a core's second-level cache beside the weights of one expert.
constexpr int64_t kBlockBytes = 640 * 1024;
constexpr int64_t kLeastRows = 64;
constexpr int64_t kMostRows = 256;

struct Cut {
  int64_t block_rows, blocks;
  int parts;  // into which the experts are divided where there are fewer blocks than threads

  static Cut of(const Level& level, int64_t bytes_of_a_row) {
    const int64_t threads = at::get_num_threads();
    int64_t rows = std::clamp(kBlockBytes / bytes_of_a_row, kLeastRows, kMostRows);
    rows = std::min(rows, std::max(kLeastRows, (level.rows + threads - 1) / threads));
    rows = (rows + 15) / 16 * 16;
    const int64_t blocks = (level.rows + rows - 1) / rows;
    const int64_t parts = std::min<int64_t>(level.experts, blocks < threads ? (threads + blocks - 1) / blocks : 1);
    return {rows, blocks, static_cast<int>(parts)};
  }
};

int part_begin(const Level& level, int part, int parts) { return level.experts * part / parts; }

// Uninitialised memory that starts on a cache line.
class Scratch {
 public:
  Scratch(int64_t pieces, int64_t bytes) : stride_((bytes + 63) / 64 * 64) {
    memory_ = at::empty({pieces * stride_ + 64}, at::kByte);
    const auto address = reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr());
    first_ = reinterpret_cast<char*>((address + 63) / 64 * 64);
  }
  void* operator[](int64_t piece) const { return first_ + piece * stride_; }

 private:
  int64_t stride_;
  at::Tensor memory_;
  char* first_;
};

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

void run_blocks(const ForwardArgs& args, const ExpertMixtureKernels& kernels) {
  const Level& level = args.level;
  const bool save = args.saved != nullptr;
  const Cut cut = Cut::of(level, kernels.forward_bytes(level, kLeastRows, save) / kLeastRows);
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

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> forward(
    at::TensorList inputs, at::TensorList weights, BiasList biases, at::TensorList gate_logits,
    at::IntArrayRef expert_inputs, at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes,
    at::IntArrayRef activations, bool save) {
  LevelTables tables(inputs, weights, gate_logits, expert_inputs, gate_experts, gate_sizes, activations);
  tables.set_biases(biases);
  const Level& level = tables.level();
  const auto options = inputs[0].options();
  std::vector<at::Tensor> outputs, saved;
  std::vector<void*> output_pointers, saved_pointers;
  for (size_t k = 0; k < gate_sizes.size(); ++k) {
    outputs.push_back(at::empty({level.rows, level.widths[level.layers]}, options));
    output_pointers.push_back(outputs.back().mutable_data_ptr());
  }
  for (int l = 0; save && l < level.layers; ++l) {
    saved.push_back(at::empty({level.experts, level.rows, level.widths[l + 1]}, options));
    saved_pointers.push_back(saved.back().mutable_data_ptr());
  }
  if (level.rows == 0 || level.widths[level.layers] == 0) return {outputs, saved};
  const ExpertMixtureKernels& table = kernels().expert_mixture[static_cast<int>(dtype_of(inputs[0]))];
  const bool tiny = level.rows <= table.tiny_rows && !save;
  tables.set_weights(weights, tiny ? WeightForm::kNatural : table.forward_form, false);
  const ForwardArgs args{level, output_pointers.data(), save ? saved_pointers.data() : nullptr};
  tiny ? run_tiny(args, table) : run_blocks(args, table);
  return {outputs, saved};
}

}  // namespace

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) { m.impl("expert_mixture_forward", TORCH_FN(forward)); }

}  // namespace mtlk
