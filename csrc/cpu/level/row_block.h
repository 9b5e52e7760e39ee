// A block of rows in groups of 16, as every kernel of a level goes through them.
#pragma once

#include "gemm/panels.h"
#include "level/level_args.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Args>
class RowBlock {
 protected:
  RowBlock(const Args& args, int64_t row, int64_t nrows)
      : args_(args), level_(args.level), row_(row), nrows_(nrows), groups_(group_count(nrows)) {}

  int64_t features() const { return level_.widths[level_.layers]; }
  int64_t row(int64_t g) const { return row_ + g * kGroup; }
  int64_t group_rows(int64_t g) const { return nrows_ - g * kGroup < kGroup ? nrows_ - g * kGroup : kGroup; }

  const Args& args_;
  const LevelShape& level_;
  const int64_t row_, nrows_, groups_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
