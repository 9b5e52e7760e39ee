// A level for serving, of whose parameters it is known where they are.
#pragma once

#include <optional>

#include "level/level_tables.h"
#include "level/spec.h"
#include "runtime/api.h"

namespace mtlk {

// Keeps the tables that serve_level makes anew at each call, but no tensor: a call may be made only while all are where
// they were. Values are read there, at each call.
class MTLK_API KeptLevel {
 public:
  // Of a chain whose gates are linear layers, all without norms; `parameters` have no inputs. Throws a ValueError also
  // where kernels could not read a parameter as it lies.
  KeptLevel(LevelSpec spec, LevelTensors parameters);
  KeptLevel(const KeptLevel&) = delete;

  const LevelSpec& spec() const { return spec_; }

  // As serve_level; nothing where the kernels for so many rows want weights in another form.
  std::optional<Tensors> serve(const Tensors& inputs) const;

 private:
  const LevelSpec spec_;
  LevelTensors tensors_;  // while the tables are made; inputs have no rows
  LevelTables tables_;
  const at::TensorOptions options_;
};

}  // namespace mtlk
