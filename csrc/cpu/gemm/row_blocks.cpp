#include "gemm/row_blocks.h"

#include <algorithm>

#include "runtime/parallel.h"

namespace mtlk {

int64_t block_rows(int64_t rows, int64_t block_bytes, int64_t bytes_of_a_row) {
  if (rows <= kMinBlockRows) return kMinBlockRows;
  const int64_t threads = at::get_num_threads();
  const int64_t most = std::clamp(block_bytes / std::max<int64_t>(bytes_of_a_row, 1), kMinBlockRows, kMaxBlockRows);
  const auto of_a_thread = [&](int64_t size) { return divide_up(divide_up(rows, size), threads) * size; };
  int64_t least = of_a_thread(kMinBlockRows), best = kMinBlockRows;
  for (int64_t size = kMinBlockRows; size <= most; size += 32) least = std::min(least, of_a_thread(size));
  for (int64_t size = kMinBlockRows; size <= most; size += 32) {
    if (of_a_thread(size) <= least + least / 50) best = size;
  }
  return best;
}

}  // namespace mtlk
