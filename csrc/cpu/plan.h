// How a call is cut into pieces of work.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "kernels.h"
#include "parallel.h"

namespace mtlk {

constexpr int64_t kLeastRows = 64;
constexpr int64_t kMostRows = 256;

struct Cut {
  int64_t block_rows, blocks;
  int parts;  // into which the experts are divided where there are fewer blocks than threads

  static Cut of(const Level& level, int64_t block_bytes, int64_t bytes_of_a_row) {
    const int64_t threads = at::get_num_threads(), rows = block_rows_of(level, block_bytes, bytes_of_a_row);
    const int64_t blocks = (level.rows + rows - 1) / rows;
    const int64_t parts = std::min<int64_t>(level.experts, blocks < threads ? (threads + blocks - 1) / blocks : 1);
    return {rows, blocks, static_cast<int>(parts)};
  }

  // A multiple of 32; what fits `block_bytes`, but at most an even share of the rows where that is not too little.
  static int64_t block_rows_of(const Level& level, int64_t block_bytes, int64_t bytes_of_a_row) {
    const int64_t threads = at::get_num_threads();
    const int64_t rows = std::clamp(block_bytes / bytes_of_a_row, kLeastRows, kMostRows);
    return (std::min(rows, std::max(kLeastRows, (level.rows + threads - 1) / threads)) + 31) / 32 * 32;
  }
};

// Rows that go through the backward pass together: the gradients of one expert's pre-activations should stay in the
// second-level cache with what they are multiplied by, and every thread should have a block.
inline int64_t chunk_rows(const Level& level, int64_t block_rows, const ExpertMixtureKernels& table) {
  const int64_t widest = *std::max_element(level.widths + 1, level.widths + level.layers + 1);
  const int64_t rows =
      std::clamp<int64_t>(table.chunk_bytes / (std::max<int64_t>(widest, 1) * table.gradient_bytes_each), 256, 2048);
  const int64_t least = std::max(rows, at::get_num_threads() * block_rows);
  return std::min((least + block_rows - 1) / block_rows, (level.rows + block_rows - 1) / block_rows) * block_rows;
}

inline int part_begin(const Level& level, int part, int parts) { return level.experts * part / parts; }

}  // namespace mtlk
