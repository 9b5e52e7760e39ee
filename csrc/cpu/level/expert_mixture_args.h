// What crosses from the operators, which know torch, to the kernels, which do not.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace mtlk {

// The gates of a call. Gate k mixes `sizes[k]` experts, whose probabilities are columns begin[k], begin[k] + 1, ... of
// the block's probabilities. The same pairs ordered by expert: those of expert e are uses[use_begin[e]] up to
// uses[use_begin[e + 1]].
struct GateUse {
  int gate;
  int column;
};

struct Gates {
  int count;
  int columns;
  const int* sizes;
  const int* begin;
  const int* use_begin;
  const GateUse* uses;
  Dtype dtype;                // of the logits
  const void* const* logits;  // [rows, sizes[k]] with any strides
  const int64_t* row_stride;
  const int64_t* column_stride;

  // Or, of an expert mixture, linear layers that make the logits from the inputs: weights [sizes[k], widths[0]] in the
  // experts' form, biases or null as theirs, and the stream that each gate reads. Null where logits are given.
  const void* const* weights;
  const int64_t* weight_ld;
  const void* const* biases;
  const int* streams;
  const void* const* scales;  // as a level's
  const void* const* shifts;
};

// A parameter or a statistic of a norm, contiguous; null for none.
struct NormPart {
  const void* values;
  Dtype dtype;
};

// A batch norm that uses its running statistics.
struct RunningNorm {
  NormPart mean, variance, weight, bias;
  double eps;
};

// Scale and shift of a batch norm by running statistics behind a product with `bias`, or null.
using FoldNorm = void (*)(const RunningNorm&, const void* bias, int64_t channels, void* scale, void* shift);

// A level of experts. Weights and biases are ordered by layer, then expert: number layer * experts + e.
struct Level {
  int64_t rows;
  int experts;
  int layers;
  const int64_t* widths;      // [layers + 1]; widths[0] is the width of the inputs
  const int* activations;     // [layers]
  const int* expert_inputs;   // [experts]
  const int* order;           // the experts, those of one stream next to each other
  const void* const* inputs;  // [rows, widths[0]], unit column stride
  const int64_t* input_ld;
  const void* const* weights;  // see WeightForm
  const int64_t* weight_ld;    // 0 for prepared ones

  // Not 0 for a weight of the storage type that the forward pass has to make ready, tile by tile, where a tile is in no
  // form which products want: elements from one input to the next, as weight_ld is from one output to the next. Null
  // without any.
  const int64_t* weight_columns;
  const void* const* biases;  // of the storage type; null where there is none
  const void* const* scales;  // of batch norms by running statistics, of the compute type, null where there is none
  const void* const* shifts;  // of them, in the place of biases; both tables are null without such norms
  Gates gates;
};

// The layers whose activations the forward pass saves. With another below, the last one's are computed again: one small
// product in place of the memory that they would take.
inline int saved_layers(const Level& level) { return level.layers > 1 ? level.layers - 1 : level.layers; }

inline int64_t weight_number(const Level& level, int64_t layer, int64_t expert) {
  return layer * level.experts + expert;
}

struct ForwardArgs {
  Level level;
  void* const* outputs;  // a contiguous [rows, widths[layers]] for each gate
  void* const* saved;    // a contiguous [experts, rows, width] for each of the saved layers, or null

  bool saves(int layer) const { return saved != nullptr && layer < saved_layers(level); }
};

struct BackwardArgs {
  Level level;
  const void* const* grad_outputs;  // [rows, widths[layers]] for each gate, unit column stride
  const int64_t* grad_output_ld;
  const void* const* saved;  // as the forward pass wrote them

  // Of the last layer, in the forward pass's form, for each expert: where it was not saved.
  const void* const* last_weights;
  const int64_t* last_weight_ld;
  void* const* grad_inputs;  // contiguous [rows, widths[0]] for each stream, or null
  void* const* grad_logits;  // contiguous, of the logits' dtype, or null
  bool need_weights, need_biases;

  // The streams whose experts do not all go together, so that sums of their gradients have to be kept: which of them
  // each stream is, or -1.
  const int* divided;
  int divided_count;

  // LevelGradients, contiguous of the storage type, and sums over the rows, of the compute type, for each layer and
  // expert: [out][weight_sum_ld[layer]] and [out]. Sums may be the results themselves; those of a weight are null where
  // all rows come at once.
  void* const* grad_weights;
  void* const* grad_biases;
  void* const* weight_sums;
  const int64_t* weight_sum_ld;
  void* const* bias_sums;

  bool need_chain() const { return grad_inputs != nullptr || need_weights || need_biases; }
};

// Rows and experts that go through the backward pass together: first the chain, block by block, then the weights'
// gradients.
struct BackwardChunk {
  int64_t row, rows;
  int64_t capacity;  // rows that the buffers are laid out for
  int first, last;   // the experts whose gradients are there, order[first, last)
  void* gradients;   // of pre-activations, see BackwardLayout
  void* operands;    // the streams, where they have to be made
};

}  // namespace mtlk
