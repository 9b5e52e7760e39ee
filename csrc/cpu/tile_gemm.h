// The GEMM tile for plain panels: C[i][lane] = sum_k A(i, k) * B[k][lane], A broadcast from its natural layout.
#pragma once

#include "simd.h"

namespace mtlk {
namespace MTLK_ISA {

// A tile spans `groups` groups of lanes and `rows` broadcast rows, so that its accumulators, one step of B and one
// broadcast fill the register file.
template <typename C>
struct TileShape {
  static constexpr int per_group = Simd<C>::per_group;
  static constexpr int groups = kRegisters >= 32 && per_group == 1 ? 2 : 1;
  static constexpr int vectors = groups * per_group;
  static constexpr int rows = (kRegisters - 1 - vectors) / vectors > 14  ? 14
                              : (kRegisters - 1 - vectors) / vectors > 0 ? (kRegisters - 1 - vectors) / vectors
                                                                         : 1;
};

// How to walk A and B: A(i, k) = a[i * a_row + k * a_col]; step k of B starts at b + k * b_step, its second group
// b_group further.
template <typename C>
struct Operands {
  const C* a;
  int64_t a_row, a_col;
  const C* b;
  int64_t b_step, b_group;
};

// Sums `depth` products in registers and writes them to out[group][row][16], on top of what is there if `add`.
template <typename C, int Rows, int Groups>
MTLK_INLINE void tile_kernel(const Operands<C>& x, int64_t depth, bool add, C* out, int64_t out_group) {
  constexpr int P = Simd<C>::per_group;
  constexpr int L = Simd<C>::lanes;
  Vector<C> acc[Rows][Groups * P] = {};
  const C* a = x.a;
  const C* b = x.b;
  for (int64_t k = 0; k < depth; ++k, a += x.a_col, b += x.b_step) {
    Vector<C> step[Groups * P];
#pragma GCC unroll 8
    for (int j = 0; j < Groups * P; ++j) step[j] = load(b + (j / P) * x.b_group + (j % P) * L);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vector<C> value = broadcast(a[i * x.a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < Groups * P; ++j) acc[i][j] += value * step[j];
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Groups * P; ++j) {
      C* place = out + (j / P) * out_group + i * kGroup + (j % P) * L;
      store(place, add ? load(place) + acc[i][j] : acc[i][j]);
    }
  }
}

// Fewer rows than the full tile: halves until nothing is left.
template <typename C, int Rows, int Groups>
void tile_rows(Operands<C> x, int64_t rows, int64_t depth, bool add, C* out, int64_t out_group) {
  while (rows >= Rows) {
    tile_kernel<C, Rows, Groups>(x, depth, add, out, out_group);
    x.a += Rows * x.a_row;
    out += Rows * kGroup;
    rows -= Rows;
  }
  if constexpr (Rows > 1) {
    if (rows > 0) tile_rows<C, Rows / 2, Groups>(x, rows, depth, add, out, out_group);
  }
}

// Long sums are cut into partial sums, which bounds the rounding error as a blocked GEMM does.
constexpr int64_t kDepth = 512;

// A tile of up to TileShape<C>::rows x TileShape<C>::groups into out[group][row][16], groups `out_group` apart.
template <typename C>
void tile_gemm(Operands<C> x, int64_t rows, int64_t groups, int64_t depth, C* out, int64_t out_group) {
  constexpr int kRows = TileShape<C>::rows;
  bool add = false;
  do {
    const int64_t part = depth < kDepth ? depth : kDepth;
    if (TileShape<C>::groups > 1 && groups > 1) {
      tile_rows<C, kRows, TileShape<C>::groups>(x, rows, part, add, out, out_group);
    } else {
      tile_rows<C, kRows, 1>(x, rows, part, add, out, out_group);
    }
    x.a += part * x.a_col;
    x.b += part * x.b_step;
    depth -= part;
    add = true;
  } while (depth > 0);
}

}  // namespace MTLK_ISA
}  // namespace mtlk
