// The kernels of a level that each instruction set provides.
#pragma once

#include "gemm/engine.h"
#include "level/level_args.h"

namespace mtlk {

// Scratch is bytes that the caller provides, aligned to a cache line.

// Of gates that are linear layers: join puts the logits' gradients of some rows next to each other, `joined_bytes` a
// row; then gradient makes what belongs to `features` features of the input from the one given on, and biases those of
// all biases, in any order.
struct GateKernels {
  int64_t features;
  int64_t (*joined_bytes)(int columns);
  int64_t (*gradient_bytes)(int columns);
  void (*join)(const GateGradientArgs&, int64_t row, int64_t nrows);
  void (*gradient)(const GateGradientArgs&, int64_t feature, void* scratch);
  void (*biases)(const GateGradientArgs&);
};

struct ChainKernels {
  EngineTable engine;
  // Whether gradients of experts that one gate mixes follow from signs.
  bool from_signs(int64_t layers, const int64_t* activations, Dtype dtype) const {
    return engine.from_signs && signs_suffice(layers, activations, dtype);
  }
  FoldNorm fold_norm;
  GateKernels gates;

  // A block of rows: run adds experts order[first, last), finish writes the outputs. With more parts than one, each
  // part leaves its sums, forward_mixed_bytes(...) of them, in `mixed`, and finish adds the parts in order.
  int64_t (*forward_bytes)(const LevelShape&, int64_t nrows, bool save);
  int64_t (*forward_mixed_bytes)(const LevelShape&, int64_t nrows);
  void (*forward)(const ChainForwardArgs&, int64_t row, int64_t nrows, int first, int last, void* scratch, void* mixed);
  void (*forward_finish)(const ChainForwardArgs&, int64_t row, int64_t nrows, const void* mixed, int parts,
                         void* scratch);

  // A chunk of the backward pass: the operands of its rows, and for each group of experts the chain for its blocks,
  // then the weights' gradients; each may run its tasks in any order. Blocks start at multiples of 32 rows within the
  // chunk. The chain runs for experts order[first, last) of the group. With more parts or groups than one,
  // finish writes the gradients of the logits and of the divided streams, from what the parts have left. With a few
  // rows the chain writes the gradients of weights and biases too, and what makes them apart is null.
  int64_t (*backward_bytes)(const LevelShape&, int64_t nrows);
  int64_t (*gradient_bytes)(const LevelShape&, int64_t chunk_rows, int experts);
  int64_t (*operand_bytes)(const LevelShape&, int64_t chunk_rows);
  int64_t (*weight_bytes)(const LevelShape&, int64_t chunk_rows);
  int64_t (*backward_gates_bytes)(const LevelShape&, int64_t nrows);
  int64_t (*backward_below_bytes)(const LevelShape&, int64_t nrows);  // of a stream
  int64_t (*backward_inner_bytes)(const LevelShape&, int64_t nrows);
  void (*backward)(const ChainBackwardArgs&, const BackwardChunk&, int64_t row, int64_t nrows, int first, int last,
                   void* scratch, const BackwardPart& part);
  void (*backward_finish)(const ChainBackwardArgs&, const BackwardChunk&, int64_t row, int64_t nrows,
                          const BackwardPart& first, int parts, void* scratch);
  int64_t (*operand_tasks)(const ChainBackwardArgs&);
  void (*make_operand)(const ChainBackwardArgs&, const BackwardChunk&, int64_t task);
  int64_t (*weight_tasks)(const ChainBackwardArgs&, const BackwardChunk&);
  void (*weight_gradient)(const ChainBackwardArgs&, const BackwardChunk&, int64_t task, void* scratch);
};

// Kernels for a block of rows, a layer and experts order[first, last); with at most kFewRows rows they want weights in
// natural form, whatever the engine's.
struct LayerwiseKernels {
  EngineTable engine;
  FoldNorm fold_norm;
  int64_t (*forward_bytes)(const LevelShape&, int64_t nrows);
  void (*layer)(const LayerwiseForwardArgs&, int64_t block, int l, int first, int last, void* scratch);
  void (*mix)(const LayerwiseForwardArgs&, int64_t block, int64_t part, int64_t parts, void* scratch);

  // What readers of expert e's layer apply: from the blocks' partial statistics, or from statistics that are there.
  void (*combine_moments)(const LayerwiseArgs&, int l, int e);
  void (*prepare)(const LayerwiseArgs&, int l, int e);

  // Backward, a layer at a time: dn of the last by last_gradient, sums by combine_sums, dz and dn of the one
  // below by layer_gradient. Of a
  // block `inner` has inner_bytes, and each of several parts leaves below_bytes, for logit_gradient and
  // reduce_input_gradients.
  int64_t (*backward_bytes)(const LevelShape&, int64_t nrows);
  int64_t (*inner_bytes)(const LevelShape&, int64_t nrows);
  int64_t (*below_bytes)(const LevelShape&, int64_t nrows);
  int64_t (*gradient_bytes)(const LevelShape&, int64_t chunk_rows);
  int64_t (*weight_bytes)(const LevelShape&, int64_t chunk_rows);
  void (*last_gradient)(const LayerwiseBackwardArgs&, int64_t block, int first, int last, void* scratch, void* inner);
  void (*logit_gradient)(const LayerwiseBackwardArgs&, int64_t block, void* scratch, const void* inner);
  void (*combine_sums)(const LayerwiseArgs&, int l, int e);
  void (*layer_gradient)(const LayerwiseBackwardArgs&, const BackwardChunk&, int64_t block, int l, int first, int last,
                         void* scratch, void* below);
  void (*reduce_input_gradients)(const LayerwiseBackwardArgs&, int64_t block, void* scratch, const void* below,
                                 int parts, int64_t stride);
  int64_t (*weight_tasks)(const LayerwiseBackwardArgs&, int l);
  void (*weight_gradient)(const LayerwiseBackwardArgs&, const BackwardChunk&, int l, int64_t task, void* scratch);
};

}  // namespace mtlk
