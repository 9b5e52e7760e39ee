// The GEMM tile for plain panels: C[i][lane] = sum_k A(i, k) * B[k][lane], A broadcast from its natural layout.
#pragma once

#include "simd/prefetch.h"
#include "simd/subnormals.h"

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

// What is multiplied, by which some strides are known where a tile is compiled: weights, or their transposes, with
// panels; panels of gradients with rows, for the weights' gradients, which may go past the caches.
enum class Product { kForward, kBackward, kWeights, kWeightsPastCaches };

// How to walk A and B. Step k = outer * inner + i of the sum has A(row, k) at a[row * a_row + outer * a_outer +
// i * a_inner]; its B starts at b + k * b_step, the second group of lanes b_group further.
template <typename C>
struct Operands {
  const C* a;
  int64_t a_row, a_inner, a_outer;
  int64_t inner;
  const C* b;
  int64_t b_step, b_group;
  const char* ahead = nullptr;  // see Prefetch; moves on by ahead_step bytes with every product
  int64_t ahead_step = 0;
};

// Where a tile goes: row i of group j at out + i * row + j * group.
template <typename C>
struct Destination {
  C* out;
  int64_t row, group;
  bool add;  // on top of what is there
};

// Sums `outer` runs of x.inner products in registers; of products with panels there is one. Past the caches they are
// not left on top of anything.
template <typename C, int Rows, int Groups, Product Kind>
MTLK_INLINE void tile_kernel(const Operands<C>& x, int64_t outer, const Destination<C>& to) {
  constexpr bool kPanels = Kind == Product::kForward || Kind == Product::kBackward;
  const int64_t runs = kPanels ? 1 : outer;
  const int64_t a_row = Kind == Product::kForward ? x.a_row : Kind == Product::kBackward ? 1 : kGroup;
  const int64_t a_inner = Kind == Product::kBackward ? x.a_inner : 1;
  const int64_t b_step = kPanels ? kGroup : x.b_step, b_group = kPanels ? x.b_group : kGroup;
  constexpr int P = Simd<C>::per_group;
  constexpr int L = Simd<C>::lanes;
  Vector<C> acc[Rows][Groups * P];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Groups * P; ++j) acc[i][j] = Vector<C>{};
  }
  // A pointer for every third row: the rows between are one and two strides away, which addressing modes can express.
  constexpr int kPointers = (Rows + 2) / 3;
  const C* a[kPointers];
  for (int i = 0; i < kPointers; ++i) a[i] = x.a + 3 * i * a_row;
  const C* b = x.b;
  [[maybe_unused]] const char* ahead = x.ahead;
  const int64_t jump = x.a_outer - x.inner * a_inner;
  // Where it goes is often in no cache, as a weight's gradient is not; it comes while the sums are made.
  if constexpr (Kind != Product::kWeightsPastCaches) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Groups * P; ++j) {
        __builtin_prefetch(to.out + i * to.row + (j / P) * to.group + (j % P) * L, 1);
      }
    }
  }
  for (int64_t o = 0; o < runs; ++o) {
    if (runs > 1) {  // the next run lies elsewhere, where no hardware prefetcher looks
      for (int i = 0; i < Rows; ++i) __builtin_prefetch(a[i / 3] + (i % 3) * a_row + x.a_outer);
    }
    for (int64_t k = 0; k < x.inner; ++k, b += b_step) {
      Vector<C> step[Groups * P];
      if (runs > 1) __builtin_prefetch(b + 16 * b_step);
      if constexpr (kPanels) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += x.ahead_step;
      }
#pragma GCC unroll 8
      for (int j = 0; j < Groups * P; ++j) step[j] = load(b + (j / P) * b_group + (j % P) * L);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vector<C> value = broadcast(a[i / 3][(i % 3) * a_row]);
#pragma GCC unroll 8
        for (int j = 0; j < Groups * P; ++j) acc[i][j] += value * step[j];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kPointers; ++i) a[i] += a_inner;
    }
    for (int i = 0; i < kPointers; ++i) a[i] += jump;
  }
  // Unrolled, here and above: accumulators that a loop's counter chooses would lie in memory.
  const auto leave = [&](auto put) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      C* const row = to.out + i * to.row;
#pragma GCC unroll 8
      for (int j = 0; j < Groups * P; ++j) {
        put(row + (j / P) * to.group + (j % P) * L, acc[i][j]);
      }
    }
  };
  if constexpr (Kind == Product::kWeightsPastCaches) {
    leave([](C* place, Vector<C> sum) { store_past_caches(place, sum); });
  } else if (to.add) {
    leave([](C* place, Vector<C> sum) { store(place, load(place) + sum); });
  } else {
    leave([](C* place, Vector<C> sum) { store(place, sum); });
  }
}

// The kernel for a number of rows that is known at run time.
template <typename C, int Rows, int Groups, Product Kind>
MTLK_INLINE void tile_of_rows(const Operands<C>& x, int64_t rows, int64_t outer, const Destination<C>& to) {
  if (rows == Rows) return tile_kernel<C, Rows, Groups, Kind>(x, outer, to);
  if constexpr (Rows > 1) tile_of_rows<C, Rows - 1, Groups, Kind>(x, rows, outer, to);
}

// A tile of up to TileShape<C>::rows x TileShape<C>::groups.
template <typename C, Product Kind>
void tile_gemm(const Operands<C>& x, int64_t rows, int64_t groups, int64_t outer, const Destination<C>& to) {
  constexpr int kRows = TileShape<C>::rows;
  if (TileShape<C>::groups > 1 && groups > 1) {
    tile_of_rows<C, kRows, TileShape<C>::groups, Kind>(x, rows, outer, to);
  } else {
    tile_of_rows<C, kRows, 1, Kind>(x, rows, outer, to);
  }
}

// Long sums are cut into partial sums of this many products, which bounds the rounding error as a blocked GEMM does.
constexpr int64_t kDepth = 512;

// The tile of a product with a panel, [k][16] a group: A(row, k) at a[row * ld + k], or backward at a[row + k * ld];
// set, or added to what is there.
template <typename C, Product Kind>
void panel_gemm(const C* a, int64_t ld, const C* panel, int64_t panel_group, int64_t depth, int64_t rows,
                int64_t groups, C* out, int64_t out_group, bool add, const Prefetch& ahead) {
  const SubnormalsAreZeros fast;
  const int64_t a_row = Kind == Product::kForward ? ld : 1, a_col = Kind == Product::kForward ? 1 : ld;
  const int64_t ahead_step = depth > 0 ? ahead.bytes / depth : 0;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t part = depth - k < kDepth ? depth - k : kDepth;
    tile_gemm<C, Kind>({a + k * a_col, a_row, a_col, 0, part, panel + k * kGroup, kGroup, panel_group,
                        ahead.first + k * ahead_step, ahead_step},
                       rows, groups, 1, {out, kGroup, out_group, add || k > 0});
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
