// Evaluates layers on plain panels of the compute type: every dtype, on every instruction set.
#pragma once

#include "expert_mixture_args.h"
#include "panels.h"
#include "tile_gemm.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename T_>
struct PlainEngine {
  using T = T_;
  using C = Compute<T>;
  using Element = C;                                            // of panels
  using Weight = C;                                             // of weights, as the glue hands them over
  static constexpr int64_t kRows = TileShape<C>::rows;          // features of a tile
  static constexpr int64_t kGroups = TileShape<C>::groups;      // groups of rows of a tile
  static constexpr WeightForm kForm = __is_same(T, C) ? WeightForm::kNatural : WeightForm::kCompute;

  // Elements of one group's panel.
  static int64_t panel_size(int64_t features) { return features * kGroup; }

  static void begin() {}
  static void end() {}

  static void pack(const T* rows, int64_t ld, int64_t nrows, int64_t features, Element* panel) {
    pack_panel(rows, ld, nrows, features, panel);
  }
  static void unpack(const Element* panel, int64_t features, T* rows, int64_t ld, int64_t nrows) {
    unpack_panel(panel, features, rows, ld, nrows);
  }
  static void clear_margin(Element*, int64_t) {}

  // Where a tile's outputs go if they form features [feature, feature + n) of a panel: straight there.
  static C* destination(Element* panel, int64_t feature, C*) { return panel + feature * kGroup; }
  static void store(Element*, int64_t, int64_t, const C*) {}

  // `n` outputs from `feature` on for `groups` groups: out[group][feature][16].
  static void tile(const Weight* w, int64_t ld, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                   int64_t groups, C* out, int64_t out_group) {
    tile_gemm<C>({w + feature * ld, ld, 1, panels, kGroup, panel_size(depth)}, n, groups, depth, out, out_group);
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
