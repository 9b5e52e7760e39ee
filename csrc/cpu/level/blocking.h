// How a call is cut into pieces of work.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "gemm/engine.h"
#include "gemm/row_blocks.h"
#include "level/expert_mixture_args.h"
#include "runtime/parallel.h"

namespace mtlk {

// Into how many parts the experts are divided: more than one where there are fewer blocks of rows than threads.
inline int parts_of(const Level& level, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  return static_cast<int>(std::min<int64_t>(level.experts, blocks < threads ? divide_up(threads, blocks) : 1));
}

// Whether every block makes weights ready anew: if all rows can be one block, threads had better share the experts.
inline bool makes_weights(const Level& level) {
  const int64_t *const columns = level.weight_columns, count = static_cast<int64_t>(level.layers) * level.experts;
  return columns && std::any_of(columns, columns + count, [](int64_t column) { return column != 0; });
}

struct Cut {
  int64_t block_rows, blocks;
  int parts;

  // Of a forward pass.
  static Cut of(const Level& level, int64_t block_bytes, int64_t bytes_of_a_row) {
    const int64_t threads = at::get_num_threads(), all = divide_up(level.rows, 32) * 32;
    const int64_t most = std::min(block_bytes / std::max<int64_t>(bytes_of_a_row, 1), kMaxBlockRows);
    if (makes_weights(level) && all <= most && level.experts % threads == 0) {
      return {all, 1, static_cast<int>(threads)};
    }
    const int64_t rows = mtlk::block_rows(level.rows, block_bytes, bytes_of_a_row);
    const int64_t blocks = divide_up(level.rows, rows);
    return {rows, blocks, parts_of(level, blocks)};
  }
};

// Rows that go through the backward pass together, in chunks of equal size: the gradients of one expert's
// pre-activations should stay in the second-level cache with what they are multiplied by, and every thread should have
// something to do.
inline int64_t chunk_rows(const Level& level, const EngineTable& engine) {
  const int64_t widest = *std::max_element(level.widths + 1, level.widths + level.layers + 1);
  const int64_t fitting = engine.chunk_bytes / (std::max<int64_t>(widest, 1) * engine.gradient_bytes_each);
  const int64_t most = std::max(std::clamp<int64_t>(fitting, 256, 2048), at::get_num_threads() * kMinBlockRows);
  return divide_up(divide_up(level.rows, divide_up(level.rows, most)), 32) * 32;
}

inline int part_begin(const Level& level, int part, int parts) { return level.experts * part / parts; }

}  // namespace mtlk
