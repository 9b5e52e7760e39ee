#include "level/losses_in_common.h"

#include <algorithm>

#include "level/blocking.h"
#include "runtime/parallel.h"

namespace mtlk {

LossesInCommon::LossesInCommon(const LevelTensors& tensors, const LevelTables& tables, const ChainKernels& kernels,
                               bool need_experts, const std::vector<int>& several)
    : experts_(tables.level().experts),
      value_size_(tensors.inputs[0].scalar_type() == at::kDouble ? sizeof(double) : sizeof(float)),
      last_values_(experts_) {
  const LevelShape& level = tables.level();
  place_.assign(*std::max_element(level.numbers, level.numbers + experts_) + 1, -1);
  for (int e = 0; e < experts_; ++e) place_[level.numbers[e]] = e;
  const at::TensorList weights(tensors.weights);
  if (need_experts) weights_.emplace().set(weights, kernels.engine, kernels.engine.backward_transposed);
  if (saved_layers(level.layers) == level.layers) return;
  last_weights_.emplace().set(weights.slice(weights.size() - experts_), kernels.engine, false);
  if (kernels.compute_last && !several.empty()) compute(tables, kernels, several);
}

void LossesInCommon::compute(const LevelTables& tables, const ChainKernels& kernels, const std::vector<int>& several) {
  ChainBackwardArgs args{};
  args.level = tables.level();
  args.saved = tables.saved();
  args.last_weights = last_weights_->pointers();
  args.last_weight_ld = last_weights_->ld();
  const LevelShape& level = args.level;
  const int64_t row_bytes = kernels.backward_bytes(level, kMinBlockRows) / kMinBlockRows;
  const int64_t rows = block_rows(level.rows, kernels.engine.block_bytes, row_bytes),
                blocks = divide_up(level.rows, rows);
  const auto count = static_cast<int64_t>(several.size()), threads = static_cast<int64_t>(at::get_num_threads());
  memory_.emplace(count, divide_up(level.rows, 32) * 32 * level.widths[level.layers] * value_size_, false);
  const Scratch scratch(threads, kernels.backward_bytes(level, rows));
  parallel_tasks_on(threads, count * blocks, [&](int64_t task, int64_t thread) {
    const int64_t i = task / blocks, row = task % blocks * rows;
    kernels.compute_last(args, row, std::min(rows, level.rows - row), several[i], scratch[thread], (*memory_)[i]);
  });
  for (int64_t i = 0; i < count; ++i) last_values_[several[i]] = (*memory_)[i];
}

LossesInCommon::Pointers LossesInCommon::point(ChainBackwardArgs& args) const {
  Pointers own;
  LevelShape& level = args.level;
  for (int l = 0; weights_ && l < level.layers; ++l) {
    for (int e = 0; e < level.experts; ++e) {
      const int at = l * experts_ + place_[level.numbers[e]];
      own.weights.push_back(weights_->pointers()[at]);
      own.weight_ld.push_back(weights_->ld()[at]);
    }
  }
  for (int e = 0; e < level.experts; ++e) {
    const int at = place_[level.numbers[e]];
    own.last_values.push_back(last_values_[at]);
    if (!last_weights_) continue;
    own.last_weights.push_back(last_weights_->pointers()[at]);
    own.last_weight_ld.push_back(last_weights_->ld()[at]);
  }
  level.weights = own.weights.data();
  level.weight_ld = own.weight_ld.data();
  args.last_weights = own.last_weights.data();
  args.last_weight_ld = own.last_weight_ld.data();
  args.last_values = own.last_values.data();
  return own;
}

}  // namespace mtlk
