// An engine evaluates products for one storage type: on float panels, on bfloat16 planes by AMX tiles or dot products,
// or on a few rows. Here is what the host code of every operator that is built on it has to know.
#pragma once

#include <cstdint>

#include "runtime/kernel_tables.h"

namespace mtlk {

// How an engine wants weights.
enum class WeightForm {
  kNatural,   // [out, in] of the storage type, unit column stride
  kCompute,   // [out, in] of the compute type
  kPrepared,  // as EngineTable::prepare writes them
};

// The rows and the width of products, see mean_width.h, from which an engine pays.
struct PaysFrom {
  int64_t rows, width;
};

// Of a call that makes its weights ready for one product alone; of a level's forward pass, which does so beside its
// products; of a level's backward pass, and of one that is layerwise.
struct Pays {
  PaysFrom call, forward, backward, layerwise_backward;
};

struct EngineTable {
  Pays pays;

  // Weights: the form, and how to prepare one that has `outputs` x `inputs` elements of the storage type, rows
  // row_stride and columns column_stride apart, one of the strides 1. Where natural_outputs is not 0, an engine that
  // wants prepared weights takes those in natural form too whose outputs are a multiple of it.
  WeightForm form;
  int64_t natural_outputs;
  int64_t (*prepared_bytes)(int64_t outputs, int64_t inputs);
  void (*prepare)(const void* weight, int64_t row_stride, int64_t column_stride, int64_t outputs, int64_t inputs,
                  void* prepared);
  bool backward_transposed;  // the backward pass wants its weights transposed

  // That a block's intermediates and a chunk's gradients may take.
  int64_t block_bytes, forward_block_bytes, chunk_bytes;
  int64_t weight_sum_multiple, gradient_bytes_each;
  bool sums_as_stored;  // sums of weights' gradients are of the storage type
  bool from_signs;      // gradients of a last layer may follow from its signs
};

// Rows up to which the engine of a few rows serves, which reads weights as they lie, row by row.
constexpr int kFewRows = 8;

// Kernels that are built on an engine, their `engine`: on the best that an instruction set has; on one that makes no
// weights ready, for calls of fewer rows or narrower layers than the other pays for; on that of a few rows, or the one
// before where it is not built for them.
template <typename K>
struct KernelsByRows {
  K usual, fewer, few;

  const K& of(int64_t rows, int64_t width, PaysFrom Pays::* which) const {
    const PaysFrom& from = usual.engine.pays.*which;
    return rows <= kFewRows ? few : rows < from.rows || width < from.width ? fewer : usual;
  }
};

// What serves a call of so many rows, whose products are so wide. Of an instruction set that was chosen by name, the
// usual kernels serve any width.
template <typename K>
const K& kernels_for(Dtype dtype, int64_t rows, int64_t width, PaysFrom Pays::* which) {
  constexpr int64_t kAnyWidth = INT64_MAX;
  return kernels_for<KernelsByRows<K>>(dtype).of(rows, isa_is_chosen() ? kAnyWidth : width, which);
}

}  // namespace mtlk
