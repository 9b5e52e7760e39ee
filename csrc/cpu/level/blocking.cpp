#include "level/blocking.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "runtime/parallel.h"

namespace mtlk {
namespace {

// Whether every block makes weights ready anew: if all rows can be one block, threads had better share the experts.
bool makes_weights(const LevelShape& level) {
  const int64_t *const columns = level.weight_columns, count = static_cast<int64_t>(level.layers) * level.experts;
  return columns && std::any_of(columns, columns + count, [](int64_t column) { return column != 0; });
}

}  // namespace

int parts_of(const LevelShape& level, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  return static_cast<int>(std::min<int64_t>(level.experts, blocks < threads ? divide_up(threads, blocks) : 1));
}

Cut Cut::of(const LevelShape& level, int64_t block_bytes, int64_t bytes_of_a_row) {
  const int64_t threads = at::get_num_threads(), all = divide_up(level.rows, 32) * 32;
  const int64_t most = std::min(block_bytes / std::max<int64_t>(bytes_of_a_row, 1), kMaxBlockRows);
  if (makes_weights(level) && all <= most && level.experts % threads == 0) return {all, 1, static_cast<int>(threads)};
  const int64_t rows = mtlk::block_rows(level.rows, block_bytes, bytes_of_a_row);
  const int64_t blocks = divide_up(level.rows, rows);
  return {rows, blocks, parts_of(level, blocks)};
}

int64_t chunk_rows(const LevelShape& level, const EngineTable& engine) {
  const int64_t widest = *std::max_element(level.widths + 1, level.widths + level.layers + 1);
  const int64_t fitting = engine.chunk_bytes / (std::max<int64_t>(widest, 1) * engine.gradient_bytes_each);
  const int64_t most = std::max(std::clamp<int64_t>(fitting, 256, 2048), at::get_num_threads() * kMinBlockRows);
  return divide_up(divide_up(level.rows, divide_up(level.rows, most)), 32) * 32;
}

}  // namespace mtlk
