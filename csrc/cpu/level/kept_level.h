// A level for serving, of whose parameters it is known where they are.
#pragma once

#include <optional>

#include "level/folded_norms.h"
#include "level/level_kernels.h"
#include "level/level_tables.h"
#include "level/spec.h"
#include "runtime/api.h"

namespace mtlk {

// Keeps the tables that serve_level makes anew at each call, but no tensor: a call may be made only while all are where
// they were. Values are read there, at each call.
class MTLK_API KeptLevel {
 public:
  // Of a chain; `parameters` and `norms` are as serve_level's, whose errors are thrown, but for the inputs, of which
  // there are none.
  KeptLevel(LevelSpec spec, const LevelTensors& parameters, const RunningNorms& norms);
  KeptLevel(const KeptLevel&) = delete;

  // As serve_level. Nothing where that would use what mtlkernels.prepare has declared, which it knows by its tensors.
  std::optional<Tensors> serve(const Tensors& inputs) const;

 private:
  Tensors serve_by_tables(const Tensors& inputs, const ChainKernels& kernels) const;

  const LevelSpec spec_;
  const LevelTensors tensors_;  // which own nothing; inputs have no rows
  const RunningNorms norms_;
  const bool declared_;
  const bool as_they_lie_;  // so that the tables hold no copies
  LevelTables tables_;
  std::vector<int64_t> norm_widths_;
};

}  // namespace mtlk
