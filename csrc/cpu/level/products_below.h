// From the gradients of a layer's pre-activations to those of what it read: products with the transposed weights.
#pragma once

#include "level/level_args.h"
#include "simd/prefetch.h"

namespace mtlk {
namespace MTLK_ISA {

// A tile's columns of a weight that is not transposed, of `depth` rows: as they lie, or where many groups of rows read
// them, and one row of the weight after another would be in the way of the last, next to each other.
template <typename Engine>
struct TileColumns {
  using Weight = typename Engine::Weight;
  static constexpr int64_t kMinGroups = 4, kMaxDepth = 512;

  TileColumns(const Weight* w, int64_t w_ld, int64_t first, int64_t n, int64_t depth, int64_t groups)
      : weight(w), ld(w_ld), feature(first) {
    if constexpr (Engine::kCopiesColumns) {
      if (groups < kMinGroups || depth > kMaxDepth) return;
      if (n == Engine::kRows) {  // copies of a size that is known call nothing
        for (int64_t k = 0; k < depth; ++k) {
          std::memcpy(copy + k * Engine::kRows, w + k * w_ld + first, Engine::kRows * sizeof(Weight));
        }
      } else {
        for (int64_t k = 0; k < depth; ++k) {
          std::memcpy(copy + k * Engine::kRows, w + k * w_ld + first, n * sizeof(Weight));
        }
      }
      weight = copy;
      ld = Engine::kRows;
      feature = 0;
    }
  }
  TileColumns(const TileColumns&) = delete;

  const Weight* weight;
  int64_t ld, feature;
  alignas(64) Weight copy[Engine::kCopiesColumns ? kMaxDepth * Engine::kRows : 1];
};

// product(columns, feature, n, group, groups, ahead) for each tile of the layer below l.
template <typename Engine, typename F>
void each_tile_below(const LevelShape& level, int l, int e, int64_t all_groups, F product) {
  const int64_t depth = level.widths[l + 1], width = level.widths[l];
  const int64_t at = weight_number(level, l, e), tiles = Engine::tiles(width);
  const auto* weight = static_cast<const typename Engine::Weight*>(level.weights[at]);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
    const TileColumns<Engine> columns(weight, level.weight_ld[at], o, n, depth, all_groups);
    Prefetch ahead;  // a weight that is not transposed lies in too many pieces
    if (Engine::kBackwardTransposed && t + 1 < tiles) {
      ahead = Engine::weight_rows(weight, level.weight_ld[at], depth, o + n, Engine::tile_begin(width, t + 2) - o - n);
    }
    for (int64_t g = 0; g < all_groups; g += Engine::kGroups) {
      const int64_t groups = all_groups - g < Engine::kGroups ? all_groups - g : Engine::kGroups;
      product(columns, o, n, g, groups, ahead.share(g, groups, all_groups));
    }
  }
}

// f(group, feature, n, tile) for each tile of the layer below l; `panels` are layer l's gradients.
template <typename Engine, typename F>
void multiply_below(const LevelShape& level, int l, int e, const typename Engine::Element* panels, int64_t groups,
                    typename Engine::C* tile, F f) {
  const int64_t depth = level.widths[l + 1];
  constexpr int64_t tile_group = Engine::kRows * kGroup;
  each_tile_below<Engine>(level, l, e, groups,
                          [&](const auto& w, int64_t o, int64_t n, int64_t g0, int64_t ng, const Prefetch& ahead) {
                            Engine::tile_back(w.weight, w.ld, w.feature, n, panels + g0 * Engine::panel_size(depth),
                                              depth, ng, tile, tile_group, false, ahead);
                            for (int64_t g = g0; g < g0 + ng; ++g) f(g, o, n, tile + (g - g0) * tile_group);
                          });
}

// The gradients of a stream are sums over experts, [group][feature][16] with the features rounded up to whole tiles of
// the products.
template <typename Engine>
int64_t stream_sums(const LevelShape& level, int64_t groups) {
  return Engine::sum_features(level.widths[0]) * groups * kGroup;
}

// Adds expert e's part, from the first layer's gradients, or begins with it. `later` is fetched meanwhile.
template <typename Engine>
void add_to_stream(const LevelShape& level, int e, const typename Engine::Element* panels, int64_t groups,
                   typename Engine::C* sums, bool add, [[maybe_unused]] const Prefetch& later = {}) {
  const int64_t depth = level.widths[1], group_size = Engine::sum_features(level.widths[0]) * kGroup;
  [[maybe_unused]] const int64_t tiles = Engine::tiles(level.widths[0]);
  [[maybe_unused]] int64_t done = 0;
  each_tile_below<Engine>(
      level, 0, e, groups, [&](const auto& w, int64_t o, int64_t n, int64_t g, int64_t ng, const Prefetch& ahead) {
        const auto* const of_group = panels + g * Engine::panel_size(depth);
        auto* const place = sums + g * group_size + o * kGroup;
        if constexpr (Engine::kFetchesSaved) {
          const Prefetches both{ahead, later.share(done, ng, tiles * groups)};
          done += ng;
          Engine::tile_back(w.weight, w.ld, w.feature, n, of_group, depth, ng, place, group_size, add, both);
        } else {
          Engine::tile_back(w.weight, w.ld, w.feature, n, of_group, depth, ng, place, group_size, add, ahead);
        }
      });
}

// Rows [row, row + nrows) of a stream's gradient from its sums.
template <typename Engine>
void write_stream(const LevelShape& level, const typename Engine::C* sums, int64_t row, int64_t nrows, void* out) {
  const int64_t width = level.widths[0], group_size = Engine::sum_features(width) * kGroup;
  auto* rows = static_cast<typename Engine::T*>(out) + row * width;
  for (int64_t r = 0; r < nrows; r += kGroup, sums += group_size) {
    unpack_panel(sums, width, rows + r * width, width, nrows - r < kGroup ? nrows - r : kGroup);
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
