// The forward pass of a chain for a block of rows: every expert's layers, then every gate's sum, on chip.
#pragma once

#include "gemm/engine.h"
#include "level/affine.h"
#include "level/forward_weights.h"
#include "level/gates.h"
#include "level/row_block.h"
#include "level/signs.h"

namespace mtlk {
namespace MTLK_ISA {

inline int64_t widest_hidden(const LevelShape& level) {
  int64_t widest = 0;
  for (int l = 1; l <= level.layers; ++l) widest = level.widths[l] > widest ? level.widths[l] : widest;
  return widest;
}

// out = activation(affine(in)) for n features of one group, [n][16]; `before` (or null) receives affine(in).
template <typename T, typename C>
void affine_activation(int code, const C* in, const Affine<T, C>& affine, int64_t n, C* out, C* before) {
  constexpr int L = Simd<C>::lanes;
  with_activation(code, [&](auto constant) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < kGroup; j += L) {
        const Vector<C> x = affine(load(in + i * kGroup + j), i);
        if (before) store(before + i * kGroup + j, x);
        store(out + i * kGroup + j, activate<decltype(constant)::value, C>(x));
      }
    }
  });
}

// acc += p * x for n features of one group, p and x of 16 lanes.
template <typename C>
MTLK_INLINE void add_weighted(const C* p, const C* x, int64_t n, C* acc) {
  constexpr int L = Simd<C>::lanes;
  constexpr int P = Simd<C>::per_group;
  Vector<C> weight[P];
  for (int j = 0; j < P; ++j) weight[j] = load(p + j * L);
  for (int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < P; ++j) {
      C* place = acc + i * kGroup + j * L;
      store(place, load(place) + weight[j] * load(x + i * kGroup + j * L));
    }
  }
}

// Where a block keeps its intermediates.
template <typename Engine>
struct ChainForwardScratch {
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  Element *input, *hidden[2], *kept;
  C *probabilities, *tile, *before, *mixed, *biases;
  typename Engine::Weight* weights;
  Word<C>* signs;
  int64_t total;

  ChainForwardScratch(const LevelShape& level, int64_t groups, bool save, void* memory) {
    Arena arena(memory);
    const int64_t widest = Engine::panel_size(widest_hidden(level)) * groups;
    const int64_t tile_size = Engine::kRows * Engine::kGroups * kGroup;
    input = arena.take<Element>(Engine::panel_size(level.widths[0]) * groups);
    hidden[0] = arena.take<Element>(widest);
    hidden[1] = arena.take<Element>(widest);
    kept = save ? arena.take<Element>(widest) : nullptr;
    probabilities = arena.take<C>(level.gates.columns * groups * kGroup);
    tile = arena.take<C>(tile_size);
    before = arena.take<C>(tile_size);
    mixed = arena.take<C>(level.gates.count * groups * level.widths[level.layers] * kGroup);
    biases = arena.take<C>(__is_same(typename Engine::T, C) ? 0 : widest_hidden(level));
    weights = arena.take<typename Engine::Weight>(2 * ForwardWeights<Engine>::made_size(level));
    signs = arena.take<Word<C>>(save ? sign_words_size(level.widths[level.layers]) * groups : 0);
    total = arena.taken();
  }
};

template <typename Engine>
class ChainForward : RowBlock<ChainForwardArgs> {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;

  ChainForward(const ChainForwardArgs& args, int64_t row, int64_t nrows, void* memory)
      : RowBlock(args, row, nrows),
        s_(args.level, groups_, args.saved != nullptr, memory),
        weights_(level_, s_.weights) {}

  // Adds experts order[first] up to order[last] to the gates' sums, s_.mixed[gate][group][feature][16].
  void run(int first, int last) {
    std::memset(s_.mixed, 0, mixed_size() * sizeof(C));
    int stream = gates(first == 0);
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i];
      if (level_.expert_inputs[e] != stream) {
        stream = level_.expert_inputs[e];
        load_input(stream);
      }
      const Element* in = s_.input;
      for (int l = 0; l < level_.layers; ++l) {
        Element* out = s_.hidden[l % 2];
        const int following = l + 1 < level_.layers ? e : level_.order[i + 1 < last ? i + 1 : first];
        layer(e, l, in, out, weight_number(level_, (l + 1) % level_.layers, following),
              l + 1 == level_.layers && i + 1 == last);
        in = out;
      }
    }
    if (args_.past_caches) fence_past_caches();
  }

  // Of a block's scratch, and the sums that a part leaves.
  static int64_t bytes(const LevelShape& level, int64_t nrows, bool save) {
    return ChainForwardScratch<Engine>(level, group_count(nrows), save, nullptr).total;
  }
  static int64_t mixed_size(const LevelShape& level, int64_t nrows) {
    return level.gates.count * padded_to_group(nrows) * level.widths[level.layers];
  }
  int64_t mixed_size() const { return mixed_size(level_, nrows_); }
  const C* mixed() const { return s_.mixed; }

  // Sums `parts` blocks of mixed values, `stride` apart, in their order, and writes the outputs.
  void finish(const C* mixed, int parts, int64_t stride) {
    for (int64_t i = 0; parts > 1 && i < mixed_size(); i += Simd<C>::lanes) {
      Vector<C> sum = load(mixed + i);
      for (int p = 1; p < parts; ++p) sum += load(mixed + p * stride + i);
      mtlk::MTLK_ISA::store(s_.mixed + i, sum);
    }
    if (parts > 1) mixed = s_.mixed;
    for (int k = 0; k < level_.gates.count; ++k) {
      for (int64_t g = 0; g < groups_; ++g) {
        T* rows = static_cast<T*>(args_.outputs[k]) + (row_ + g * kGroup) * features();
        unpack_panel(mixed + (k * groups_ + g) * features() * kGroup, features(), rows, features(), group_rows(g));
      }
    }
  }

 private:
  // The gates' probabilities. Returns the stream whose input is loaded then, or -1. One of a block's parts `writes` the
  // logits that are saved.
  int gates(bool writes) {
    int stream = -1;
    if (level_.gates.weights) {
      for (int k = level_.gates.count - 1; k >= 0; --k) {  // so that the first stream is the last to be loaded
        if (level_.gates.streams[k] != stream) load_input(stream = level_.gates.streams[k]);
        gate_layer(k, writes);
      }
      return stream;
    }
    for (int64_t g = 0; g < groups_; ++g) {
      gate_probabilities(level_.gates, row_ + g * kGroup, group_rows(g), probabilities(g));
    }
    return stream;
  }

  // Gate k's linear layer on the input that is loaded, and its softmax.
  void gate_layer(int k, bool writes) {
    const Gates& gates = level_.gates;
    const auto* weight = static_cast<const typename Engine::Weight*>(gates.weights[k]);
    const auto affine = Affine<T, C>::of(gates.biases, gates.scales, gates.shifts, k);
    const int64_t depth = level_.widths[0], width = gates.sizes[k], in_size = Engine::panel_size(depth);
    constexpr int64_t tile_group = Engine::kRows * kGroup;
    for (int64_t t = 0; t < Engine::tiles(width); ++t) {
      const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
      for (int64_t g0 = 0; g0 < groups_; g0 += Engine::kGroups) {
        const int64_t ng = groups_ - g0 < Engine::kGroups ? groups_ - g0 : Engine::kGroups;
        Engine::tile(weight, gates.weight_ld[k], o, n, s_.input + g0 * in_size, depth, ng, s_.tile, tile_group,
                     Prefetch{});
        for (int64_t g = g0; g < g0 + ng; ++g) {
          affine_activation<T, C>(kNone, s_.tile + (g - g0) * tile_group, affine.from(o), n,
                                  probabilities(g) + (gates.begin[k] + o) * kGroup, nullptr);
        }
      }
    }
    for (int64_t g = 0; g < groups_; ++g) {
      C* panel = probabilities(g) + gates.begin[k] * kGroup;
      if (args_.logits) {
        T* rows = static_cast<T*>(args_.logits) + row(g) * gates.columns + gates.begin[k];
        save_logits(panel, static_cast<int>(width), writes ? rows : nullptr, gates.columns, group_rows(g));
      }
      softmax_panel(panel, static_cast<int>(width));
    }
  }

  C* probabilities(int64_t g) const { return s_.probabilities + g * level_.gates.columns * kGroup; }

  void load_input(int stream) {
    const int64_t width = level_.widths[0], ld = level_.input_ld[stream];
    const T* rows = static_cast<const T*>(level_.inputs[stream]) + row_ * ld;
    for (int64_t g = 0; g < groups_; ++g) {
      Element* panel = s_.input + g * Engine::panel_size(width);
      Engine::pack(rows + g * kGroup * ld, ld, group_rows(g), width, panel);
    }
  }

  // One layer of expert e; the weights of number `next` are those that will be needed after it, unless the pass ends.
  void layer(int e, int l, const Element* in, Element* out, int64_t next, bool ends) {
    const int64_t width = level_.widths[l + 1], at = weight_number(level_, l, e), tiles = Engine::tiles(width);
    const Affine<C, C> affine = widened(Affine<T, C>::of(level_, at), width);
    for (int64_t g = 0; g < groups_ && l + 1 < level_.layers; ++g) {
      Engine::clear_margin(out + g * Engine::panel_size(width), width);
    }
    const bool signs = args_.signs && saved_place(level_, l, e) < 0;
    const int64_t words = sign_words_size(width);
    if (signs) std::memset(s_.signs, 0, words * groups_ * sizeof(Word<C>));
    for (int64_t t = 0; t < tiles; ++t) {
      const TileWeights<Engine> weights = weights_.get({at, t});
      const bool last = t + 1 == tiles;
      weights_.during({at, t}, last ? WeightTile{next, 0} : WeightTile{at, t + 1}, groups_, last && ends,
                      [&](const auto& meanwhile) { tile(e, l, t, weights, affine, in, out, meanwhile); });
    }
    if constexpr (!Engine::kSavesTiles) {
      if (args_.saves(l, e)) write_saved(e, l, saves_before(e, l) || l + 1 == level_.layers ? s_.kept : out);
    }
    for (int64_t g = 0; signs && g < groups_; ++g) {
      store_signs(s_.signs + g * words, width, group_rows(g), args_.signs + sign_offset(level_, e, row(g)));
    }
  }

  // With the biases of a layer in the compute type, which each group of rows adds anew.
  Affine<C, C> widened(const Affine<T, C>& affine, int64_t n) {
    if (!affine.bias) return {nullptr, affine.scale, affine.shift};
    if constexpr (__is_same(T, C)) return affine;
    widen(affine.bias, s_.biases, n);
    return {s_.biases, nullptr, nullptr};
  }

  bool saves_before(int e, int l) const { return args_.saves(l, e) && from_input(level_.activations[l]); }

  // Tile t of a layer, for all rows.
  template <typename Meanwhile>
  MTLK_INLINE void tile(int e, int l, int64_t t, const TileWeights<Engine>& weights, const Affine<C, C>& of_layer,
                        const Element* in, Element* out, const Meanwhile& meanwhile) {
    const int64_t depth = level_.widths[l], width = level_.widths[l + 1];
    const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
    const bool last = l + 1 == level_.layers, save = args_.saves(l, e), save_before = saves_before(e, l);
    const int64_t in_size = Engine::panel_size(depth), out_size = Engine::panel_size(width);
    constexpr int64_t tile_group = Engine::kRows * kGroup;
    const Affine<C, C> affine = of_layer.from(o);
    for (int64_t g0 = 0; g0 < groups_; g0 += Engine::kGroups) {
      const int64_t ng = groups_ - g0 < Engine::kGroups ? groups_ - g0 : Engine::kGroups;
      Engine::tile(weights.weight, weights.ld, weights.feature, n, in + g0 * in_size, depth, ng, s_.tile, tile_group,
                   meanwhile.share(g0, ng, groups_));
      for (int64_t g = g0; g < g0 + ng; ++g) {
        C* values = s_.tile + (g - g0) * tile_group;
        if (last && args_.signs && !save) {
          add_signs<C>(o, n, s_.signs + g * sign_words_size(width),
                       [&](int64_t i, int j) { return affine(load(values + i * kGroup + j), i); });
        }
        if (last && uses(e) <= kFusedUses) {
          mix_activated(e, g, o, n, values, affine, save ? values : nullptr);
          if (save) keep_last(e, g, o, n, values);
          continue;
        }
        if (!last && (!save || (Engine::kSavesPanels && !save_before))) {
          store_activated(l, values, affine, n, out + g * out_size, o);
          if (save) keep_panel(e, l, g, o, n, out + g * out_size);
          continue;
        }
        C* before = save_before ? s_.before : nullptr;
        C* after = last ? values : Engine::destination(out + g * out_size, o, values);
        affine_activation(level_.activations[l], values, affine, n, after, before);
        if (last) {
          if (save) keep_last(e, g, o, n, save_before ? before : after);
          mix(e, g, o, n, after);
        } else {
          Engine::store(out + g * out_size, o, n, after);
          if (save) keep(e, l, g, o, n, save_before ? before : after);
        }
      }
    }
  }

  // activation(affine(values)) of n features, straight into the next layer's input.
  void store_activated(int l, const C* values, const Affine<C, C>& affine, int64_t n, Element* panel, int64_t o) {
    with_activation(level_.activations[l], [&](auto constant) {
      Engine::store_each(panel, o, n, [&](int64_t i, int j) {
        return activate<decltype(constant)::value, C>(affine(load(values + i * kGroup + j), i));
      });
    });
  }

  // Adds activation(affine(values)) of n features of expert e's last layer to every gate's sum, in one pass. `kept`, or
  // null, receives what the backward pass wants of it.
  void mix_activated(int e, int64_t g, int64_t o, int64_t n, const C* values, const Affine<C, C>& affine, C* kept) {
    with_activation(level_.activations[level_.layers - 1], [&](auto constant) {
      switch (uses(e)) {
        case 1:
          return mix_activated<decltype(constant)::value, 1>(e, g, o, n, values, affine, kept);
        case 2:
          return mix_activated<decltype(constant)::value, 2>(e, g, o, n, values, affine, kept);
        case 3:
          return mix_activated<decltype(constant)::value, 3>(e, g, o, n, values, affine, kept);
      }
    });
  }

  template <int Code, int Uses>
  void mix_activated(int e, int64_t g, int64_t o, int64_t n, const C* values, const Affine<C, C>& affine, C* kept) {
    constexpr int L = Simd<C>::lanes;
    const Gates& gates = level_.gates;
    const GateUse* use = gates.uses + gates.use_begin[e];
    C* sums[Uses];
    for (int u = 0; u < Uses; ++u) sums[u] = s_.mixed + ((use[u].gate * groups_ + g) * features() + o) * kGroup;
    for (int j = 0; j < kGroup; j += L) {
      Vector<C> p[Uses];
      for (int u = 0; u < Uses; ++u) p[u] = load(probabilities(g) + use[u].column * kGroup + j);
      for (int64_t i = 0; i < n; ++i) {
        const Vector<C> z = affine(load(values + i * kGroup + j), i), x = activate<Code, C>(z);
        if (kept) mtlk::MTLK_ISA::store(kept + i * kGroup + j, from_input(Code) ? z : x);
#pragma GCC unroll 3
        for (int u = 0; u < Uses; ++u) {
          C* place = sums[u] + i * kGroup + j;
          mtlk::MTLK_ISA::store(place, load(place) + p[u] * x);
        }
      }
    }
  }

  // Gates that mix expert e; up to kFusedUses of them take its last layer as it comes.
  static constexpr int kFusedUses = 3;
  int uses(int e) const { return level_.gates.use_begin[e + 1] - level_.gates.use_begin[e]; }

  // Saves n features of the last layer.
  void keep_last(int e, int64_t g, int64_t o, int64_t n, const C* values) {
    if (group_rows(g) < kGroup) return keep(e, level_.layers - 1, g, o, n, values);
    T* const place = saved_rows(e, level_.layers - 1, g) + o * kGroup;
    const int64_t count = n * kGroup;
    if (args_.past_caches && can_go_past_caches(place, 0) && count % kPerVector<T> == 0) {
      narrow_past_caches(values, place, count);
    } else {
      narrow(values, place, count);
    }
  }

  // Saves what the backward pass wants of n features as rows: at once, or in a panel for write_saved.
  void keep(int e, int l, int64_t g, int64_t o, int64_t n, const C* values) {
    const int64_t width = level_.widths[l + 1];
    if constexpr (Engine::kSavesTiles) {
      unpack_panel(values, n, saved_rows(e, l, g) + o, width, group_rows(g), args_.past_caches);
    } else if (l + 1 == level_.layers || from_input(level_.activations[l])) {
      std::memcpy(s_.kept + (g * width + o) * kGroup, values, n * kGroup * sizeof(C));
    }
  }

  // The same of what is stored in a layer's output.
  void keep_panel(int e, int l, int64_t g, int64_t o, int64_t n, const Element* panel) {
    if constexpr (Engine::kSavesPanels) {
      const int64_t width = level_.widths[l + 1];
      Engine::save_panel(panel, o, n, saved_rows(e, l, g) + o, width, group_rows(g), args_.past_caches);
    }
  }

  T* saved_rows(int e, int l, int64_t g) const {
    const int64_t width = level_.widths[l + 1];
    return static_cast<T*>(args_.saved[l]) + (saved_place(level_, l, e) * level_.rows + row(g)) * width;
  }

  void mix(int e, int64_t g, int64_t o, int64_t n, const C* values) {
    const Gates& gates = level_.gates;
    for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
      const GateUse use = gates.uses[u];
      const C* p = probabilities(g) + use.column * kGroup;
      add_weighted(p, values, n, s_.mixed + ((use.gate * groups_ + g) * features() + o) * kGroup);
    }
  }

  // Rows of a layer; of the last one's those of a group that is not full.
  void write_saved(int e, int l, const C* panels) {
    const int64_t width = level_.widths[l + 1];
    for (int64_t g = l + 1 < level_.layers ? 0 : nrows_ / kGroup; g < groups_; ++g) {
      unpack_panel(panels + g * width * kGroup, width, saved_rows(e, l, g), width, group_rows(g), args_.past_caches);
    }
  }

  ChainForwardScratch<Engine> s_;
  ForwardWeights<Engine> weights_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
