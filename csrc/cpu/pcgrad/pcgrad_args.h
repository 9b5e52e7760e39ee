// What crosses from PCGrad's operators to their kernels.
#pragma once

#include <cstdint>

namespace mtlk {

// A run of elements of one parameter, from the gradients that some tasks have for it.
struct PcgradPiece {
  const void* const* grads;  // `count` of them, where the parameter starts
  int count;
  int64_t first, elements;
};

// Kernels for one storage type.
struct PcgradKernels {
  // The inner products <g_i, g_j> over a piece, to products[i * count + j] for i <= j.
  int64_t (*gram_bytes)(int count);
  void (*gram)(const PcgradPiece&, double* products, void* scratch);

  // out = sum_i coefficients[i] * g_i, `out` where the parameter starts; where `past`, past the caches.
  void (*combine)(const PcgradPiece&, const double* coefficients, void* out, bool past);
};

}  // namespace mtlk
