// The weights of the forward pass, tile by tile.
#pragma once

#include "level/level_args.h"
#include "simd/prefetch.h"

namespace mtlk {
namespace MTLK_ISA {

// Tile t of weight number `at`, which is layer * experts + expert.
struct WeightTile {
  int64_t at, t;
  bool operator==(const WeightTile&) const = default;
};

// Where a tile's outputs begin: `feature` of a weight whose rows are `ld` apart, 0 for a prepared one.
template <typename Engine>
struct TileWeights {
  const typename Engine::Weight* weight;
  int64_t ld, feature;
};

// Hands out the weights of one tile while it fetches those of the next, or makes them where they are not in the form
// that products want: made ahead of a whole layer, they would go to the second-level cache and back.
template <typename Engine>
class ForwardWeights {
 public:
  // `made` has room for two tiles.
  ForwardWeights(const LevelShape& level, typename Engine::Weight* made)
      : level_(level), made_(made), size_(made_size(level)) {}

  // Of a tile of any layer.
  static int64_t made_size(const LevelShape& level) {
    int64_t size = 0;
    for (int l = 0; l < level.layers; ++l) {
      const int64_t of_layer = Engine::made_size(level.widths[l]);
      size = of_layer > size ? of_layer : size;
    }
    return size;
  }

  // The weights of a tile. They stay until those of the tile after the next are made.
  TileWeights<Engine> get(const WeightTile& tile) {
    const int64_t o = begin(tile);
    if (!makes(tile)) {
      return {static_cast<const typename Engine::Weight*>(level_.weights[tile.at]), level_.weight_ld[tile.at], o};
    }
    if constexpr (Engine::kMakesTiles) {
      if (!(ready_ == tile)) maker(tile, 0).finish();
      return {buffer(), 0, 0};
    }
    __builtin_unreachable();
  }

  // f(what to do during the products of a tile of n features with `groups` groups of rows); `next` comes after it, and
  // at the end of a pass nothing is made, as the next pass has other memory.
  template <typename F>
  void during(const WeightTile& tile, const WeightTile& next, int64_t groups, bool ends, F f) {
    if constexpr (Engine::kMakesTiles) {
      if (!ends && makes(next)) {
        flip_ = !flip_;
        auto made = maker(next, Engine::turns(outputs(tile), groups, depth(tile.at)));
        f(MakeAhead<decltype(made)>{&made});
        made.finish();
        ready_ = next;
        return;
      }
    }
    f(rows_of(next));
  }

 private:
  int64_t depth(int64_t at) const { return level_.widths[at / level_.experts]; }
  int64_t begin(const WeightTile& tile) const {
    return Engine::tile_begin(level_.widths[tile.at / level_.experts + 1], tile.t);
  }

  int64_t outputs(const WeightTile& tile) const { return begin({tile.at, tile.t + 1}) - begin(tile); }

  // Tiles that are full need no making where products take rows as they are.
  bool makes(const WeightTile& tile) const {
    const int64_t column = level_.weight_columns ? level_.weight_columns[tile.at] : 0;
    if (column == 0) return false;
    if constexpr (Engine::kNaturalOutputs > 0) {
      return column != 1 || level_.weight_ld[tile.at] <= 0 || outputs(tile) % Engine::kNaturalOutputs != 0;
    }
    return true;
  }

  // Where the weights of a tile lie.
  Prefetch rows_of(const WeightTile& tile) const {
    const auto* weight = static_cast<const typename Engine::Weight*>(level_.weights[tile.at]);
    if (makes(tile)) return {};
    return Engine::weight_rows(weight, level_.weight_ld[tile.at], depth(tile.at), begin(tile), outputs(tile));
  }

  typename Engine::Weight* buffer() const { return made_ + (flip_ ? size_ : 0); }

  auto maker(const WeightTile& tile, int64_t turns) const {
    using T = typename Engine::T;
    const int64_t row = level_.weight_ld[tile.at];
    const T* const weight = static_cast<const T*>(level_.weights[tile.at]) + begin(tile) * row;
    return typename Engine::Maker({weight, row, level_.weight_columns[tile.at]}, outputs(tile), depth(tile.at), turns,
                                  buffer());
  }

  const LevelShape& level_;
  typename Engine::Weight* const made_;
  const int64_t size_;
  WeightTile ready_{-1, 0};
  bool flip_ = false;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
