// Blocks of rows, whose intermediates stay in cache.
#pragma once

#include <cstdint>

namespace mtlk {

constexpr int64_t kMinBlockRows = 64;
constexpr int64_t kMaxBlockRows = 256;

// Rows of a block, a multiple of 32: as many as fit `block_bytes`, but so that no thread gets much more than its share,
// unless that is too little. A row may take nothing.
int64_t block_rows(int64_t rows, int64_t block_bytes, int64_t bytes_of_a_row);

}  // namespace mtlk
