// How a call is cut into pieces of work.
#pragma once

#include "gemm/engine.h"
#include "gemm/row_blocks.h"
#include "level/level_args.h"

namespace mtlk {

// Into how many parts the experts are divided: more than one where there are fewer blocks of rows than threads.
int parts_of(const LevelShape& level, int64_t blocks);

// Of a forward pass.
struct Cut {
  int64_t block_rows, blocks;
  int parts;

  static Cut of(const LevelShape& level, int64_t block_bytes, int64_t bytes_of_a_row);
};

// Rows that go through the backward pass together, in chunks of equal size: the gradients of one expert's
// pre-activations should stay in the second-level cache with what they are multiplied by, and every thread should have
// something to do.
int64_t chunk_rows(const LevelShape& level, const EngineTable& engine);

inline int part_begin(const LevelShape& level, int part, int parts) { return level.experts * part / parts; }

}  // namespace mtlk
