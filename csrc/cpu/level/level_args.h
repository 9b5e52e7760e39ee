// What crosses from the operators, which know torch, to the kernels, which do not.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "simd/activation_codes.h"

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

  // Or, of a chain, linear layers that make the logits from the inputs: weights [sizes[k], widths[0]] in the
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

// A level of experts, or the part of one that a backward pass reaches. Weights and biases are ordered by layer, then
// expert: number layer * experts + e.
struct LevelShape {
  int64_t rows;
  int experts;
  int layers;
  const int64_t* widths;         // [layers + 1]; widths[0] is the width of the inputs
  const int64_t* activations;    // [layers]
  const int64_t* expert_inputs;  // [experts]
  const int* order;              // the experts, those of one stream next to each other

  // [experts], their numbers in the whole level, over whose experts activations and statistics are stacked, and whose
  // numbers dropout counts.
  const int* numbers;

  // [experts], their places among those of the whole level whose last layer is saved; of any other, ~place among those.
  const int* last_places;
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

inline int64_t sign_bytes(int64_t features) { return (features + 7) / 8; }

// Where expert e is among those over which what is saved of a layer is stacked; negative where it is not saved.
inline int saved_place(const LevelShape& level, int layer, int e) {
  return layer + 1 < level.layers ? level.numbers[e] : level.last_places[e];
}

// Whether some experts' last layers may have to be computed again.
inline bool computes_last_again(const LevelShape& level) {
  for (int e = 0; e < level.experts; ++e) {
    if (level.last_places[e] < 0) return true;
  }
  return false;
}

// Of an expert whose last layer is not saved, where its signs are, see signs.h.
inline int64_t sign_offset(const LevelShape& level, int e, int64_t row) {
  return (~level.last_places[e] * level.rows + row) * sign_bytes(level.widths[level.layers]);
}

inline int64_t weight_number(const LevelShape& level, int64_t layer, int64_t expert) {
  return layer * level.experts + expert;
}

// What a backward pass is given, and where its results go.
struct GradientArgs {
  const void* const* grad_outputs;  // [rows, widths[layers]] for each gate, unit column stride
  const int64_t* grad_output_ld;
  void* const* grad_inputs;                      // contiguous [rows, widths[0]] for each stream, or null
  void* const* grad_logits;                      // contiguous, of the logits' dtype, or null
  bool need_experts, need_weights, need_biases;  // need_experts: more than the logits' gradients
  bool weights_past_caches;                      // their gradients are more than caches keep, see Leave

  // Contiguous of the storage type, and sums over the rows, of the compute type, for each layer and expert:
  // [out][weight_sum_ld[layer]] and [out]. Sums may be the results themselves; those of a weight are null where all
  // rows come at once. A bias that is not there has neither.
  void* const* grad_weights;
  void* const* grad_biases;
  void* const* weight_sums;
  const int64_t* weight_sum_ld;
  void* const* bias_sums;
};

// Rows and experts that go through the backward pass together: first the gradients of pre-activations, block by block,
// then the weights' gradients.
struct BackwardChunk {
  int64_t row, rows;
  int64_t capacity;  // rows that the buffers are laid out for
  int first, last;   // the experts whose gradients are there, order[first, last)
  void* gradients;   // of pre-activations, see BackwardLayout
  void* operands;    // the streams, where they have to be made
};

// What a part of a block's experts has beside its scratch.
struct BackwardPart {
  void* gates;  // for gates' probabilities and outputs' gradients in panels
  bool made;    // they are there, of an earlier group

  // With more parts or groups than one, otherwise null: sums of the divided streams' gradients, panels a stream, and
  // inner products <dy, output>, [column], which all parts of a block have in common.
  void *sums, *inner;
  bool add;  // to the sums of an earlier group
};

// Chain: all layers of a block of rows, one after another. ------------------------------------------------------------

// The forward pass saves the activations of every layer, but of the last one's only what the backward pass cannot do
// without. The last one's are read in panels and by nobody else, so that of each expert every full group of 16 rows
// lies as one, [width][16], and rows that are left lie as rows, as those of the other layers do.
//
// It can do without where one gate mixes an expert: with p the gate's probability, dy its output's gradient, d = dy
// where the last activation passes a gradient and otherwise 0, and h what the layer below gave, it makes u = W^T d
// anyway, as p * u is the gradient of h; and <dy, output> = <d, W h + b> = <u, h> + <d, b>. Where d is not 0 has to be
// saved for relu, as signs. Not of float16, whose engine for AMX splits gradients into planes. LevelSpec._signs_suffice
// is the same rule in Python.
inline bool signs_suffice(int64_t layers, const int64_t* activations, Dtype dtype) {
  if (layers == 1 || dtype == Dtype::kFloat16) return false;
  const int64_t last = activations[layers - 1];
  return (last == kRelu || last == kNone) && !from_input(static_cast<int>(activations[layers - 2]));
}

struct ChainForwardArgs {
  LevelShape level;
  void* const* outputs;  // a contiguous [rows, widths[layers]] for each gate
  void* const* saved;    // for each layer what SavedShape::sizes says, contiguous; or null
  uint8_t* signs;        // [others, rows, sign_bytes] of the last layer's outputs of the other experts, or null
  void* logits;          // of linear gates [rows, columns] of the storage type, or null
  bool past_caches;      // what is saved is more than caches keep, see Leave

  bool saves(int layer, int e) const { return saved != nullptr && saved_place(level, layer, e) >= 0; }
};

struct ChainBackwardArgs : GradientArgs {
  LevelShape level;
  const void* const* saved;  // as the forward pass wrote them, of the whole level's experts

  // Whether signs_suffice, to these kernels too; and the signs, null where all outputs pass a gradient.
  bool from_signs;
  const uint8_t* signs;

  // Of the last layer, in the forward pass's form, for each expert: where it was not saved, and has to be computed
  // again as signs are not enough after all.
  const void* const* last_weights;
  const int64_t* last_weight_ld;

  // The streams whose experts do not all go together, so that sums of their gradients have to be kept: which of them
  // each stream is, or -1.
  const int* divided;
  int divided_count;
};

// Gradients of gates that are linear layers of one stream, from those of their logits.
struct GateGradientArgs {
  int64_t rows, width;             // of the stream
  int gates, columns;              // columns: logits of all these gates
  const int* sizes;                // [gates]
  const void* const* grad_logits;  // [gates], contiguous [rows, sizes[k]] of the storage type
  const void* input;               // unit column stride
  int64_t input_ld;
  const void* const* weights;  // for each column [width], contiguous
  void* joined;                // of the compute type, for the logits' gradients of all these gates, see GateKernels
  void* grad_input;            // contiguous [rows, width], which is added to; or null
  void* const* grad_weights;   // for each column [width]; or null
  void* const* grad_biases;    // for each column an element or null; or null
};

// Layerwise: a layer of all rows after another. -----------------------------------------------------------------------

enum Norm : int { kNoNorm = 0, kBatchNorm = 1, kLayerNorm = 2 };

// A layer's normalisation, the slopes of its activation, and dropout. Arrays are of the compute type; those a channel
// are [experts][ld].
struct NormLayer {
  int norm;
  double eps;
  double rate;  // of dropout
  double dice_eps;
  void* z;  // pre-activations of the storage type, [experts][rows][width] of the whole level; the forward pass's

  // Statistics of the whole level: [experts][width] of a batch norm, [experts][rows] of a layer norm, otherwise null.
  void *mean, *variance;
  const void* const* scales;  // [experts], null where there is none
  const void* const* shifts;
  const void* const* activation_slopes;     // null where it has none
  const int64_t* activation_slope_strides;  // [experts], 0 where one serves all channels

  // What a reader applies: (z - center) * factor + shift a channel after batch norm, and after layer norm
  // (z - mean) * rstd * factor + shift with a mean and a rstd a row, [experts][rows].
  int64_t ld;
  void *center, *factor, *shift, *rstd;
  void* activation_slope;       // a channel, null without slopes
  void *gate_mean, *gate_rate;  // of Dice's gate, [experts][rows]; only in the backward pass, which fills them

  // Backward. dz = factor * dn + grad_slope * (z - center) + grad_offset a channel after batch norm; after layer norm
  // dz = rstd * (factor * dn - row_mean - zhat * row_slope) with values a row.
  void *grad_slope, *grad_offset, *row_mean, *row_slope;
  void* grad;                // dn of the storage type, [experts][group of 16 rows][width][16]
  void* const* grad_scales;  // [experts], null where it is not asked for
  void* const* grad_shifts;
  void* const* grad_activation_slopes;  // [width], also where one serves all channels
};

struct LayerwiseArgs {
  LevelShape level;
  const NormLayer* layers;
  uint64_t seed;

  // For each block of rows, expert and channel, what it adds to the sums: [block][experts][arrays][ld of the layer].
  void* partials;
  int64_t partial_arrays, partial_ld;
  int64_t block_rows, blocks;
};

struct LayerwiseForwardArgs : LayerwiseArgs {
  void* const* outputs;  // a contiguous [rows, widths[layers]] for each gate
};

struct LayerwiseBackwardArgs : LayerwiseArgs, GradientArgs {};

}  // namespace mtlk
