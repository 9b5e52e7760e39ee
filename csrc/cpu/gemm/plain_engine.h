// Evaluates layers on plain panels of the compute type: every dtype, on every instruction set.
#pragma once

#include "gemm/engine.h"
#include "gemm/panels.h"
#include "gemm/tile_gemm.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename T_>
struct PlainEngine {
  using T = T_;
  using C = Compute<T>;
  using Element = C;                                        // of panels
  using Weight = C;                                         // of weights, as the glue hands them over
  static constexpr int64_t kRows = TileShape<C>::rows;      // features of a tile
  static constexpr int64_t kGroups = TileShape<C>::groups;  // groups of rows of a tile
  static constexpr WeightForm kForm = __is_same(T, C) ? WeightForm::kNatural : WeightForm::kCompute;
  static constexpr Pays kPays{};
  static constexpr int64_t kNaturalOutputs = 0;       // there is no other form
  static constexpr int64_t kBlockBytes = 640 * 1024;  // with an expert's weights beside it in the second-level cache
  static constexpr int64_t kForwardBlockBytes = kBlockBytes;
  static constexpr int64_t kChunkBytes = 512 * 1024;

  // Features are divided evenly among as few tiles as will do; tile t begins at tile_begin(features, t). A layer
  // without features has no tile, and where its first would begin is asked all the same, to fetch its weights ahead.
  static int64_t tiles(int64_t features) { return (features + kRows - 1) / kRows; }
  static int64_t tile_begin(int64_t features, int64_t t) { return features > 0 ? features * t / tiles(features) : 0; }

  // Elements of one group's panel.
  static int64_t panel_size(int64_t features) { return features * kGroup; }

  // Where the weights of a tile lie, for fetching them ahead.
  static Prefetch weight_rows(const Weight* w, int64_t ld, int64_t, int64_t feature, int64_t n) {
    return {reinterpret_cast<const char*>(w + feature * ld), n * ld * static_cast<int64_t>(sizeof(Weight))};
  }

  static void begin() {}
  static void end() {}

  static void pack(const T* rows, int64_t ld, int64_t nrows, int64_t features, Element* panel) {
    pack_panel(rows, ld, nrows, features, panel);
  }
  static Vector<C> load_panel(const Element* panel, int64_t feature, int j) {
    return load(panel + feature * kGroup + j);
  }

  // Tiles have odd widths: values are saved when all of a layer's are there.
  static constexpr bool kSavesTiles = false, kSavesPanels = false;
  static void clear_margin(Element*, int64_t) {}

  // Where a tile's outputs go if they form features [feature, feature + n) of a panel: straight there.
  static C* destination(Element* panel, int64_t feature, C*) { return panel + feature * kGroup; }
  static void store(Element*, int64_t, int64_t, const C*) {}
  // value(i, j): lanes from j on of the 16 rows of feature + i.
  template <typename F>
  MTLK_INLINE static void store_each(Element* panel, int64_t feature, int64_t n, F value) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < kGroup; j += Simd<C>::lanes) {
        mtlk::MTLK_ISA::store(panel + (feature + i) * kGroup + j, value(i, j));
      }
    }
  }

  // `n` outputs from `feature` on for `groups` groups: out[group][feature][16].
  static void tile(const Weight* w, int64_t ld, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                   int64_t groups, C* out, int64_t out_group, const Prefetch& ahead) {
    panel_gemm<C, Product::kForward>(w + feature * ld, ld, panels, panel_size(depth), depth, n, groups, out, out_group,
                                     false, ahead);
  }

  static constexpr bool kMakesTiles = false;  // weights come in the form that products want
  static int64_t made_size(int64_t) { return 0; }

  // Backward: the same with the weight transposed, n of its columns against gradient panels of `depth` features; sums
  // of several have room for sum_features.
  static constexpr bool kBackwardTransposed = false;
  static constexpr bool kCopiesColumns = kGroups == 1;
  static constexpr bool kFetchesSaved = false;
  static void tile_back(const Weight* w, int64_t ld, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                        int64_t groups, C* out, int64_t out_group, bool add, const Prefetch& ahead) {
    panel_gemm<C, Product::kBackward>(w + feature, ld, panels, panel_size(depth), depth, n, groups, out, out_group, add,
                                      ahead);
  }
  static int64_t sum_features(int64_t features) { return features; }

  // Gradients of pre-activations, kept for the weights' gradients: a panel a group, so that the chain reads the same.
  using Gradient = C;
  static constexpr int64_t kGradientRows = kGroup;
  static constexpr int64_t kGradientBytes = sizeof(C);
  static constexpr bool kSumsAsStored = __is_same(T, C);
  static constexpr bool kGradientIsPanel = true, kFromSigns = true;
  static int64_t gradient_size(int64_t features) { return features * kGroup; }
  // Those of features [feature, feature + n) of a group, in both their places: value(i, j) as in store_each.
  template <typename F>
  MTLK_INLINE static void store_gradients(Element* panel, Gradient*, int64_t, int64_t, int64_t feature, int64_t n,
                                          F value) {
    store_each(panel, feature, n, value);
  }
  // The same, only for the weights' gradients.
  template <typename F>
  MTLK_INLINE static void keep_gradients(Gradient* base, int64_t features, int64_t group, int64_t feature, int64_t n,
                                         F value) {
    store_each(base + group * gradient_size(features), feature, n, value);
  }

  // What a layer read, for the weights' gradients: rows [nrows][operand_width(features)] of the compute type.
  using Operand = C;
  static int64_t operand_size(int64_t features, int64_t nrows) { return rounded(features) * nrows; }
  // The rows as they are where they fit, otherwise null.
  static const Operand* direct_operand(const T* rows, int64_t features) {
    if constexpr (__is_same(T, C)) {
      if (features % kGroup == 0) return rows;
    }
    return nullptr;
  }
  // f(values, n, row, column) completes n values of a row, from a multiple of 16 on, in place; n is rounded up.
  template <typename Activate>
  static void make_operand(const T* rows, int64_t ld, int64_t nrows, int64_t features, Operand* out, Activate f) {
    const int64_t width = rounded(features);
    for (int64_t r = 0; r < nrows; ++r) {
      fetch_rows(rows + (r + kRowsAhead) * ld, features);
      widen(rows + r * ld, out + r * width, features);
      for (int64_t i = features; i < width; ++i) out[r * width + i] = 0;
      f(out + r * width, width, r, 0);
    }
  }

  // Leaves gradient^T operand over nrows rows, for its columns [column, column + n), n <= kColumns, in grad[o][0 .. n).
  // Narrow tiles read the gradient so often that it should come from the second-level cache, and the operand from the
  // first: some rows at a time, which all columns share, and 16 of the columns next to each other.
  static constexpr bool kNarrow = kGroups == 1;
  static constexpr int64_t kColumns = (kNarrow ? 8 : kGroups) * kGroup;
  static constexpr int64_t kSumMultiple = kGroup;  // to which the rows of grad are rounded up
  static void weight_gradient(const Gradient* gradient, int64_t outputs, const Operand* operand, int64_t operand_ld,
                              int64_t nrows, int64_t column, int64_t n, C* grad, int64_t ld, Leave leave) {
    const SubnormalsAreZeros fast;
    constexpr int64_t kPart = kNarrow ? 16 * 1024 / (kGroup * sizeof(C)) : kDepth;
    const bool at_once = nrows <= kPart && (nrows < kGroup || nrows % kGroup == 0);
    const bool past = leave == Leave::kPastCaches && at_once && can_go_past_caches(grad, ld);
    if constexpr (kNarrow) {
      alignas(64) C values[kPart * kGroup];
      for (int64_t m = 0; m < nrows; m += kPart) {
        const int64_t part = nrows - m < kPart ? nrows - m : kPart;
        for (int64_t j = 0; j < n; j += kGroup) {
          const Operand* first = operand + m * operand_ld + column + j;
          for (int64_t r = 0; r < part; ++r)
            std::memcpy(values + r * kGroup, first + r * operand_ld, kGroup * sizeof(C));
          const bool add = leave == Leave::kAdd || m > 0;
          products(gradient + m * outputs, outputs, values, kGroup, 1, part, grad + j, ld, add, past);
        }
      }
    } else {
      products(gradient, outputs, operand + column, operand_ld, group_count(n), nrows, grad, ld, leave == Leave::kAdd,
               past);
    }
    if (past) fence_past_caches();
  }

  // gradient^T operand, over nrows rows, for `groups` groups of the operand's columns; past the caches in one go.
  static void products(const Gradient* gradient, int64_t outputs, const Operand* operand, int64_t operand_ld,
                       int64_t groups, int64_t nrows, C* grad, int64_t ld, bool add, bool past) {
    for (int64_t t = 0; t < tiles(outputs); ++t) {
      const int64_t o = tile_begin(outputs, t), rows = tile_begin(outputs, t + 1) - o;
      bool on_top = add;
      for (int64_t m = 0; m < nrows;) {
        // Whole groups first, up to the depth of a partial sum; then what is left of the last group.
        const int64_t left = nrows - m;
        const int64_t inner = left < kGroup ? left : kGroup;
        const int64_t outer = left < kGroup ? 1 : (left < kDepth ? left : kDepth) / kGroup;
        const Operands<C> factors{gradient + m * outputs + o * kGroup,
                                  kGroup,
                                  1,
                                  gradient_size(outputs),
                                  inner,
                                  operand + m * operand_ld,
                                  operand_ld,
                                  kGroup};
        const Destination<C> to{grad + o * ld, ld, kGroup, on_top};
        if (past) {
          tile_gemm<C, Product::kWeightsPastCaches>(factors, rows, groups, outer, to);
        } else {
          tile_gemm<C, Product::kWeights>(factors, rows, groups, outer, to);
        }
        on_top = true;
        m += outer * inner;
      }
    }
  }
  static void bias_gradient(const Gradient* gradient, int64_t outputs, int64_t nrows, C* grad, bool add) {
    for (int64_t o = 0; o < outputs; ++o) {
      C total = add ? grad[o] : static_cast<C>(0);
      C sum[kGroup] = {};
      for (int64_t g = 0; g * kGroup < nrows; ++g) {
        for (int i = 0; i < kGroup; ++i) sum[i] += gradient[g * gradient_size(outputs) + o * kGroup + i];
      }
      for (int i = 0; i < kGroup; ++i) total += sum[i];
      grad[o] = total;
    }
  }

  static int64_t rounded(int64_t n) { return padded_to_group(n); }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
