// What crosses from the operator gated_mixture to its kernels.
#pragma once

#include "level/level_args.h"

namespace mtlk {

struct GatedMixtureArgs {
  int64_t rows, experts, features;
  const void* values;  // [rows, experts, features], unit stride of features
  int64_t row_stride, expert_stride;
  Gates gates;

  void* const* outputs;  // forward: a contiguous [rows, features] for each gate

  const void* const* grad_outputs;  // backward: [rows, features] for each gate, unit column stride
  const int64_t* grad_output_ld;
  void* grad_values;         // contiguous, or null
  void* const* grad_logits;  // contiguous, of the logits' dtype, or null
};

// Kernels for one storage type, for rows [first, last). Scratch is bytes that the caller provides, aligned to a cache
// line.
struct GatedMixtureKernels {
  int64_t (*bytes)(const GatedMixtureArgs&);
  void (*forward)(const GatedMixtureArgs&, int64_t first, int64_t last, void* scratch);
  void (*backward)(const GatedMixtureArgs&, int64_t first, int64_t last, void* scratch);
};

}  // namespace mtlk
