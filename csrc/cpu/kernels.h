// The kernels that each instruction set provides, and the choice among them at run time.
#pragma once

#include "expert_mixture_args.h"

namespace mtlk {

// Kernels for one storage type. Scratch is bytes that the caller provides, aligned to a cache line.
struct ExpertMixtureKernels {
  WeightForm forward_form, backward_form;

  // A block of rows: run adds experts order[first, last), finish writes the outputs. With more parts than one, each
  // part leaves its sums, forward_mixed(...) values of the compute type, in `mixed`, and finish adds them in order.
  int64_t (*forward_bytes)(const Level&, int64_t nrows, bool save);
  int64_t (*forward_mixed_bytes)(const Level&, int64_t nrows);
  void (*forward)(const ForwardArgs&, int64_t row, int64_t nrows, int first, int last, void* scratch, void* mixed);
  void (*forward_finish)(const ForwardArgs&, int64_t row, int64_t nrows, const void* mixed, int parts, void* scratch);

  // The same for all rows of a call with at most tiny_rows of them, weights in natural form.
  int64_t tiny_rows;
  int64_t (*tiny_bytes)(const Level&);
  int64_t (*tiny_mixed_bytes)(const Level&);
  void (*tiny)(const ForwardArgs&, int first, int last, void* scratch, void* mixed);
  void (*tiny_finish)(const ForwardArgs&, const void* mixed, int parts, void* scratch);
};

struct Kernels {
  const char* isa;
  ExpertMixtureKernels expert_mixture[4];  // by Dtype
};

// The best that this processor and this build have.
const Kernels& kernels();

}  // namespace mtlk
