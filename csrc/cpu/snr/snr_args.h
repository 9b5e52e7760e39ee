// What crosses from SNR's operators to their kernels.
#pragma once

#include <cstdint>

#include "gemm/engine.h"

namespace mtlk {

// An open route, from sub-network `input` to sub-network `output`.
struct SnrRoute {
  int output, input;
  double z;
  const void* weight;  // see WeightForm; null for Aver
  int64_t weight_ld;
};

// v_i = sum of z W_ij u_j, or of z u_j, over the open routes to i. The gradient of u is of the same form, with the
// roles of inputs and outputs exchanged and the weights transposed.
struct SnrSum {
  int64_t rows;
  int inputs, outputs;
  const int64_t *input_widths, *output_widths;
  const void* const* in;  // [rows, width], unit column stride
  const int64_t* in_ld;
  void* const* out;        // contiguous [rows, width]
  const SnrRoute* routes;  // those to output i are routes[route_begin[i]] up to routes[route_begin[i + 1]]
  const int* route_begin;
  bool transposed;
};

// M = dv_i^T u_j over a chunk of rows, of which the gradients of W_ij and z_ij follow: columns from `column` on, in one
// go. `sum` is of the compute type, its rows `ld` apart, a multiple of EngineTable::weight_sum_multiple.
struct SnrProduct {
  int64_t rows;
  const void* gradient;  // as SnrTransKernels::make_gradient leaves it
  int64_t outputs;
  const void* u;  // the chunk's first row
  int64_t u_ld;
  const void* operand;  // as SnrTransKernels::make_operand leaves it
  int64_t inputs;
  void* sum;
  int64_t ld;
  bool add;  // on top of what is there
};

// Kernels for one storage type. Scratch is bytes that the caller provides, aligned to a cache line.
struct SnrTransKernels {
  EngineTable engine;

  // Outputs [first, last) of a block of rows.
  int64_t (*sum_bytes)(const SnrSum&, int64_t nrows);
  void (*sum)(const SnrSum&, int64_t row, int64_t nrows, int first, int last, void* scratch);

  int64_t (*gradient_bytes)(int64_t features, int64_t nrows);
  void (*make_gradient)(const void* rows, int64_t ld, int64_t nrows, int64_t features, void* out);
  int64_t (*operand_bytes)(int64_t features, int64_t nrows);
  void (*make_operand)(const void* rows, int64_t ld, int64_t nrows, int64_t features, void* out);
  int64_t columns;  // of one product
  void (*product)(const SnrProduct&, int64_t column);

  // <M, W>; writes z * M to grad, which is contiguous, unless it is null. It may be where M is.
  double (*finish)(const void* sum, int64_t ld, int64_t rows, int64_t columns, const void* weight, int64_t weight_ld,
                   double z, void* grad);
};

// A pair of an output and an input whose z wants a gradient, <dv_i, u_j>.
struct SnrPair {
  int output, input;
};

struct SnrDots {
  int64_t features;
  int inputs, outputs;
  const void *const *u, *const *grad_outputs;  // unit column stride
  const int64_t *u_ld, *grad_output_ld;
  const SnrPair* pairs;
  int64_t count;
};

// Of a run of rows: sums, past the caches where `past`, and inner products. Either may be null; of both, the rows that
// both read come from memory once.
struct SnrAverWork {
  const SnrSum* sum;
  bool past;
  const SnrDots* dots;
};

struct SnrAverKernels {
  int64_t (*bytes)(const SnrAverWork&);
  // Rows [first, last); `results` are of the inner products.
  void (*run)(const SnrAverWork&, int64_t first, int64_t last, double* results, void* scratch);
};

}  // namespace mtlk
