// The forward pass of a layerwise level for a block of rows: one layer of a run of experts, or all gates' sums.
//
// A batch norm needs a layer's statistics over all rows before anybody can read the layer. So each layer writes its
// pre-activations and what the block adds to the statistics; who reads them next normalises, activates and drops.
#pragma once

#include "gemm/rows_engine.h"
#include "level/chain_forward_kernels.h"
#include "level/layer_reader.h"

namespace mtlk {
namespace MTLK_ISA {

// The widest layer that some layer reads.
inline int64_t widest_read(const LevelShape& level) {
  int64_t widest = 0;
  for (int l = 0; l < level.layers; ++l) widest = level.widths[l] > widest ? level.widths[l] : widest;
  return widest;
}

// Few rows: products with the weights as they are, from and to rows that lie beside each other.
inline bool few_rows(const LevelShape& level) { return level.rows <= kFewRows; }
inline int64_t few_ld(const LevelShape& level) {
  const int64_t widest = widest_hidden(level), read = widest_read(level);
  return few_rows(level) ? padded_channels(widest > read ? widest : read) : 0;
}

template <typename Engine>
struct LayerwiseForwardScratch {
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  Element* input;
  C *values, *group, *probabilities, *mixed;
  C *rows_in, *rows_out;  // of few rows: [kFewRows][rows_ld]
  int64_t rows_ld;
  uint16_t* kept;
  typename Engine::Weight* weights;
  int64_t total;

  LayerwiseForwardScratch(const LevelShape& level, int64_t groups, void* memory) {
    Arena arena(memory);
    const int64_t widest = widest_hidden(level), read = widest_read(level);
    rows_ld = few_ld(level);
    rows_in = arena.take<C>(kFewRows * rows_ld);
    rows_out = arena.take<C>(kFewRows * rows_ld);
    input = arena.take<Element>(Engine::panel_size(read) * groups);
    values = arena.take<C>(padded_channels(widest) * groups * kGroup);
    group = arena.take<C>(padded_channels(widest) * kGroup);
    probabilities = arena.take<C>(level.gates.columns * kGroup);
    mixed = arena.take<C>(level.gates.count * level.widths[level.layers] * kGroup);
    kept = arena.take<uint16_t>(widest);
    weights = arena.take<typename Engine::Weight>(2 * ForwardWeights<Engine>::made_size(level));
    total = arena.taken();
  }
};

template <typename Engine>
class LayerwiseForward : RowBlock<LayerwiseForwardArgs> {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;

  LayerwiseForward(const LayerwiseForwardArgs& args, int64_t block, void* memory)
      : RowBlock(args, block * args.block_rows, rows_of_block(args, block)),
        block_(block),
        s_(args.level, group_count(args.block_rows), memory),
        weights_(level_, s_.weights) {}

  // Layer l of experts order[first] up to order[last]: pre-activations and the block's part of their statistics.
  void layer(int l, int first, int last) {
    int stream = -1;
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i];
      if (l > 0) {
        load_hidden(l - 1, e);
      } else if (level_.expert_inputs[e] != stream) {
        stream = level_.expert_inputs[e];
        load_input(stream);
      }
      product(l, e, level_.order[i + 1 < last ? i + 1 : i], i + 1 == last);
      finish(l, e);
    }
  }

  // Every gate's sum of the experts' outputs, for one of several parts of the rows.
  void mix(int64_t part, int64_t parts) {
    const Gates& gates = level_.gates;
    const int l = level_.layers - 1;
    const int64_t features = level_.widths[level_.layers];
    for (int64_t g = groups_ * part / parts; g < groups_ * (part + 1) / parts; ++g) {
      gate_probabilities(gates, row(g), group_rows(g), s_.probabilities);
      std::memset(s_.mixed, 0, gates.count * features * kGroup * sizeof(C));
      for (int e = 0; e < level_.experts; ++e) {
        if (gates.use_begin[e] == gates.use_begin[e + 1]) continue;
        const LayerReader<T> reader(args_, l, e);
        read_group(reader, g);
        for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
          const GateUse use = gates.uses[u];
          add_weighted(s_.probabilities + use.column * kGroup, s_.group, features,
                       s_.mixed + use.gate * features * kGroup);
        }
      }
      for (int k = 0; k < gates.count; ++k) {
        T* rows = static_cast<T*>(args_.outputs[k]) + row(g) * features;
        unpack_panel(s_.mixed + k * features * kGroup, features, rows, features, group_rows(g));
      }
    }
  }

 private:
  static constexpr int L = Simd<C>::lanes;

  static void store(C* place, Vector<C> value) { mtlk::MTLK_ISA::store(place, value); }

  void load_input(int stream) {
    const int64_t width = level_.widths[0], ld = level_.input_ld[stream];
    const T* rows = static_cast<const T*>(level_.inputs[stream]) + row_ * ld;
    if (few_rows(level_)) {
      for (int64_t r = 0; r < nrows_; ++r) widen(rows + r * ld, s_.rows_in + r * s_.rows_ld, width);
      return clear_absent_rows(s_.rows_in, s_.rows_ld, nrows_);
    }
    for (int64_t g = 0; g < groups_; ++g) {
      Engine::pack(rows + g * kGroup * ld, ld, group_rows(g), width, s_.input + g * Engine::panel_size(width));
    }
  }

  // A group of an expert's layer: f(value), where value(i, j) is lanes from j on of feature i.
  template <typename F>
  MTLK_INLINE void read(const LayerReader<T>& reader, int64_t g, F f) {
    const uint16_t* kept = nullptr;
    if (reader.drops()) {
      reader.dropout().panel(row(g), reader.width(), s_.kept);
      kept = s_.kept;
    }
    reader.load_group(row(g), group_rows(g), s_.group);
    const C* n = reader.normalize(row(g), group_rows(g), 0, reader.width(), s_.group, s_.group, nullptr);
    reader.activated(group_rows(g), n, kept, f);
  }

  // The same into s_.group.
  void read_group(const LayerReader<T>& reader, int64_t g) {
    read(reader, g, [&](auto value) {
      for (int64_t i = 0; i < reader.width(); ++i) {
        for (int j = 0; j < kGroup; j += L) store(s_.group + i * kGroup + j, value(i, j));
      }
    });
  }

  void load_hidden(int l, int e) {
    const LayerReader<T> reader(args_, l, e);
    if (few_rows(level_)) {
      read_group(reader, 0);
      return rows_of_panel(s_.group, reader.width(), s_.rows_in, s_.rows_ld, nrows_);
    }
    for (int64_t g = 0; g < groups_; ++g) {
      Element* panel = s_.input + g * Engine::panel_size(reader.width());
      Engine::clear_margin(panel, reader.width());
      read(reader, g, [&](auto value) { Engine::store_each(panel, 0, reader.width(), value); });
    }
  }

  int64_t group_size(int l) const { return padded_channels(level_.widths[l + 1]) * kGroup; }

  // The weights of expert `next` are those that will be needed after it, unless the pass ends.
  void product(int l, int e, int next, bool ends) {
    const int64_t depth = level_.widths[l], width = level_.widths[l + 1], at = weight_number(level_, l, e);
    const int64_t tiles = Engine::tiles(width);
    if (few_rows(level_)) {
      RowsEngine<T>::multiply(nrows_, static_cast<const T*>(level_.weights[at]), level_.weight_ld[at], width,
                              s_.rows_in, depth, s_.rows_out, s_.rows_ld);
      panel_of_rows(s_.rows_out, s_.rows_ld, nrows_, width, s_.values);
      return complete(l, e, 0, width);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
      const TileWeights<Engine> weights = weights_.get({at, t});
      const bool last = t + 1 == tiles;
      weights_.during({at, t}, last ? WeightTile{weight_number(level_, l, next), 0} : WeightTile{at, t + 1}, groups_,
                      last && ends, [&](const auto& meanwhile) { tile(l, o, n, weights, meanwhile); });
      complete(l, e, o, n);
    }
  }

  // Features [o, o + n) of a layer, for all rows.
  template <typename Meanwhile>
  MTLK_INLINE void tile(int l, int64_t o, int64_t n, const TileWeights<Engine>& weights, const Meanwhile& meanwhile) {
    const int64_t depth = level_.widths[l], in_size = Engine::panel_size(depth);
    C* const values = s_.values + o * kGroup;
    for (int64_t g = 0; g < groups_; g += Engine::kGroups) {
      const int64_t ng = groups_ - g < Engine::kGroups ? groups_ - g : Engine::kGroups;
      Engine::tile(weights.weight, weights.ld, weights.feature, n, s_.input + g * in_size, depth, ng,
                   values + g * group_size(l), group_size(l), meanwhile.share(g, ng, groups_));
    }
  }

  // What follows features [o, o + n) of expert e's layer.
  void complete(int l, int e, int64_t o, int64_t n) {
    add_affine(l, e, o, n);
    if (args_.layers[l].norm != kBatchNorm) return;
    channel_moments(s_.values + o * kGroup, group_size(l), nrows_, n, partials_of<C>(args_, block_, e, 0) + o,
                    partials_of<C>(args_, block_, e, 1) + o);
  }

  // Completes the product and rounds to the storage type, so that the statistics are those of what readers find: of
  // equal rows the deviations must be zero.
  void add_affine(int l, int e, int64_t o, int64_t n) {
    const auto affine = Affine<T, C>::of(level_, weight_number(level_, l, e)).from(o);
    if (affine.nothing() && __is_same(T, C)) return;
    for (int64_t g = 0; g < groups_; ++g) {
      C* values = s_.values + g * group_size(l) + o * kGroup;
      for (int64_t i = 0; i < n; ++i) {
        for (int j = 0; j < kGroup; j += L) {
          store(values + i * kGroup + j, affine(load(values + i * kGroup + j), i));
        }
        if constexpr (!__is_same(T, C)) {
          T narrow_values[kGroup];
          narrow(values + i * kGroup, narrow_values, kGroup);
          widen(narrow_values, values + i * kGroup, kGroup);
        }
      }
    }
  }

  // Writes the pre-activations, and a layer norm's statistics.
  void finish(int l, int e) {
    const LayerReader<T> reader(args_, l, e);
    for (int64_t g = 0; g < groups_; ++g) {
      const C* values = s_.values + g * group_size(l);
      if (reader.norm() == kLayerNorm) {
        C mean[kGroup], variance[kGroup];
        row_moments(values, reader.width(), mean, variance);
        const NormLayer& layer = args_.layers[l];
        std::memcpy(static_cast<C*>(layer.mean) + e * level_.rows + row(g), mean, group_rows(g) * sizeof(C));
        std::memcpy(static_cast<C*>(layer.variance) + e * level_.rows + row(g), variance, group_rows(g) * sizeof(C));
      }
      unpack_panel(values, reader.width(), reader.rows(row(g)), reader.width(), group_rows(g));
    }
  }

  const int64_t block_;
  LayerwiseForwardScratch<Engine> s_;
  ForwardWeights<Engine> weights_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
