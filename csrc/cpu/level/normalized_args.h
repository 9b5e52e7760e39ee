// What the operator normalized_mixture hands to its kernels, beside what expert_mixture's take.
#pragma once

#include "level/expert_mixture_args.h"

namespace mtlk {

enum Norm : int { kNoNorm = 0, kBatchNorm = 1, kLayerNorm = 2 };

// A layer's normalisation, the slopes of its activation, and dropout. Arrays are of the compute type; those a channel
// are [experts][ld].
struct NormLayer {
  int norm;
  double eps;
  double rate;  // of dropout
  double dice_eps;
  void* z;  // pre-activations of the storage type, [experts][rows][width]; written by the forward pass alone

  // Statistics: [experts][width] of a batch norm, [experts][rows] of a layer norm, otherwise null.
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

struct NormalizedArgs {
  Level level;
  const NormLayer* layers;
  uint64_t seed;

  // For each block of rows, expert and channel, what it adds to the sums: [block][experts][arrays][ld of the layer].
  void* partials;
  int64_t partial_arrays, partial_ld;
  int64_t block_rows, blocks;
};

struct NormalizedForwardArgs : NormalizedArgs {
  void* const* outputs;  // a contiguous [rows, widths[layers]] for each gate
};

struct NormalizedBackwardArgs : NormalizedArgs {
  const void* const* grad_outputs;  // [rows, widths[layers]] for each gate, unit column stride
  const int64_t* grad_output_ld;
  void* const* grad_inputs;  // contiguous [rows, widths[0]] for each stream, or null
  void* const* grad_logits;  // contiguous, of the logits' dtype, or null
  bool need_chain, need_weights, need_biases;

  // As in BackwardArgs.
  void* const* grad_weights;
  void* const* grad_biases;
  void* const* weight_sums;
  const int64_t* weight_sum_ld;
  void* const* bias_sums;
};

}  // namespace mtlk
