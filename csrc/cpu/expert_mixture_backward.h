// The backward pass of expert_mixture.
//
// The chain runs over blocks of rows, in cache: gradients of the outputs -> of the gates' logits and the last
// pre-activations -> down the layers -> of the inputs, summed over the experts that read them. It leaves the gradients
// of the pre-activations of a chunk of rows; the weights' gradients then take the batch as the depth of their GEMM.
#pragma once

#include "expert_mixture_forward.h"

namespace mtlk {
namespace MTLK_ISA {

// Where the gradients of a chunk lie: layer by layer, those of each expert together.
template <typename Engine>
struct BackwardLayout {
  const Level& level;
  int64_t chunk_rows;  // of a full chunk
  int experts;         // of the chunk's group

  int64_t gradient_block(int l) const {
    return (chunk_rows + Engine::kGradientRows - 1) / Engine::kGradientRows *
           Engine::gradient_size(level.widths[l + 1]);
  }
  // Of the group's expert number `index`.
  int64_t gradient_offset(int l, int index) const {
    int64_t offset = 0;
    for (int i = 0; i < l; ++i) offset += experts * gradient_block(i);
    return offset + index * gradient_block(l);
  }
  int64_t gradients() const {
    int64_t size = 0;
    for (int l = 0; l < level.layers; ++l) size += experts * gradient_block(l);
    return size;
  }
};

inline int stream_count(const Level& level) {
  int count = 0;
  for (int e = 0; e < level.experts; ++e) {
    count = level.expert_inputs[e] >= count ? level.expert_inputs[e] + 1 : count;
  }
  return count;
}

template <typename Engine>
struct BackwardScratch {
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  C *grad_outputs, *probabilities, *inner, *kept, *after, *whole, *below, *tile;
  Element *panel[2], *input;
  int64_t total;

  BackwardScratch(const Level& level, int64_t groups, void* memory) {
    Arena arena(memory);
    const int64_t widest = widest_hidden(level), features = level.widths[level.layers];
    grad_outputs = arena.take<C>(level.gates.count * groups * features * kGroup);
    probabilities = arena.take<C>(level.gates.columns * groups * kGroup);
    inner = arena.take<C>(level.gates.columns * groups * kGroup);
    kept = arena.take<C>(widest * groups * kGroup);
    after = arena.take<C>(features * kGroup);
    whole = arena.take<C>(features * kGroup);
    below = arena.take<C>(level.widths[0] * groups * kGroup);
    tile = arena.take<C>(Engine::kRows * Engine::kGroups * kGroup);
    const int64_t panels = Engine::kGradientIsPanel ? 0 : Engine::panel_size(widest) * groups;
    panel[0] = arena.take<Element>(panels);
    panel[1] = arena.take<Element>(panels);
    input = arena.take<Element>(
        saved_layers(level) < level.layers ? Engine::panel_size(level.widths[level.layers - 1]) * groups : 0);
    total = reinterpret_cast<char*>(arena.take<char>(0)) - static_cast<char*>(memory);
  }
};

template <typename Engine>
class BackwardBlock {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  using Gradient = typename Engine::Gradient;

  // Rows [row, row + nrows) of the batch, which lie in the chunk.
  BackwardBlock(const BackwardArgs& args, const BackwardChunk& chunk, const BackwardLayout<Engine>& layout, int64_t row,
                int64_t nrows, void* memory)
      : args_(args),
        level_(args.level),
        chunk_(chunk),
        layout_(layout),
        row_(row),
        nrows_(nrows),
        groups_((nrows + kGroup - 1) / kGroup),
        s_(args.level, groups_, memory) {}

  // What the parts of a block leave for finish: each its sums of the divided streams' gradients, below[stream][group]
  // [feature][16], all of them inner[column], in the block's own scratch where there is one part.
  int64_t below_size() const { return args_.divided_count * stream_size(); }

  // Experts order[first] up to order[last]; with one part and one group, null for what parts leave.
  void run(int first, int last, C* below, C* inner, bool add) {
    const Gates& gates = level_.gates;
    below_ = below;
    if (inner) s_.inner = inner;
    if (below && !add) std::memset(below, 0, below_size() * sizeof(C));
    for (int64_t g = 0; g < groups_; ++g) {
      gate_probabilities(gates, row_ + g * kGroup, group_rows(g), s_.probabilities + g * gates.columns * kGroup);
      for (int k = 0; k < gates.count; ++k) {
        const int64_t ld = args_.grad_output_ld[k];
        const T* rows = static_cast<const T*>(args_.grad_outputs[k]) + (row_ + g * kGroup) * ld;
        pack_panel(rows, ld, group_rows(g), features(), s_.grad_outputs + (k * groups_ + g) * features() * kGroup);
      }
    }
    int stream = -1;
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i];
      if (level_.expert_inputs[e] != stream) {
        if (stream >= 0) leave_inputs(stream);
        stream = level_.expert_inputs[e];
        std::memset(s_.below, 0, stream_size() * sizeof(C));
      }
      index_ = i - chunk_.first;
      expert(e);
    }
    leave_inputs(stream);
    if (!below && args_.grad_logits) write_logits();
  }

  // Sums the inputs' gradients of `parts` parts in their order.
  void finish(const C* below, int parts, C* inner) {
    if (args_.grad_logits) {
      for (int64_t g = 0; g < groups_; ++g) {
        C* panel = s_.probabilities + g * level_.gates.columns * kGroup;
        gate_probabilities(level_.gates, row_ + g * kGroup, group_rows(g), panel);
      }
      s_.inner = inner;
      write_logits();
    }
    int stream = -1;
    for (int i = 0; args_.grad_inputs && i < level_.experts; ++i) {
      if (level_.expert_inputs[level_.order[i]] == stream) continue;
      stream = level_.expert_inputs[level_.order[i]];
      if (args_.divided[stream] < 0) continue;
      for (int64_t at = 0; at < stream_size(); at += Simd<C>::lanes) {
        Vector<C> sum{};
        for (int p = 0; p < parts; ++p)
          sum += load(below + p * below_size() + args_.divided[stream] * stream_size() + at);
        mtlk::MTLK_ISA::store(s_.below + at, sum);
      }
      write_inputs(stream);
    }
  }

 private:
  int64_t features() const { return level_.widths[level_.layers]; }
  int64_t group_rows(int64_t g) const { return nrows_ - g * kGroup < kGroup ? nrows_ - g * kGroup : kGroup; }

  // Of the expert whose turn it is.
  Gradient* gradients(int l) const {
    return static_cast<Gradient*>(chunk_.gradients) + layout_.gradient_offset(l, index_) +
           (row_ - chunk_.row) / Engine::kGradientRows * Engine::gradient_size(level_.widths[l + 1]);
  }
  // The panels of a layer's gradients, which the next step down reads.
  Element* panels(int l) const {
    if constexpr (Engine::kGradientIsPanel) {
      return gradients(l);
    } else {
      return s_.panel[l % 2];
    }
  }

  void load_kept(int l, int e) {
    const int64_t width = level_.widths[l + 1];
    const T* rows = static_cast<const T*>(args_.saved[l]) + (e * level_.rows + row_) * width;
    for (int64_t g = 0; g < groups_; ++g) {
      pack_panel(rows + g * kGroup * width, width, group_rows(g), width, s_.kept + g * width * kGroup);
    }
  }

  // What a saved layer's activation gave.
  void load_input(int l, int e) {
    const int64_t width = level_.widths[l + 1], size = Engine::panel_size(width);
    if (!from_input(level_.activations[l])) {
      const T* rows = static_cast<const T*>(args_.saved[l]) + (e * level_.rows + row_) * width;
      for (int64_t g = 0; g < groups_; ++g) {
        Engine::pack(rows + g * kGroup * width, width, group_rows(g), width, s_.input + g * size);
      }
      return;
    }
    load_kept(l, e);
    with_activation(level_.activations[l], [&](auto constant) {
      for (int64_t g = 0; g < groups_; ++g) {
        const C* kept = s_.kept + g * width * kGroup;
        Engine::clear_margin(s_.input + g * size, width);
        Engine::store_each(s_.input + g * size, 0, width, [&](int64_t i, int j) {
          return activate<decltype(constant)::value, C>(load(kept + i * kGroup + j));
        });
      }
    });
  }

  // The same where it still lies there as load_kept would have it, otherwise null.
  const C* loaded(int code) const {
    if constexpr (__is_same(Element, C)) {
      if (saved_layers(level_) < level_.layers && !from_input(code)) return s_.input;
    }
    return nullptr;
  }

  // What would have been saved of the last layer, from the one below.
  void compute_kept(int e) {
    const int l = level_.layers - 1, code = level_.activations[l];
    const int64_t depth = level_.widths[l], width = level_.widths[l + 1], size = Engine::panel_size(depth);
    const int64_t at = static_cast<int64_t>(l) * level_.experts + e, ld = args_.last_weight_ld[e];
    const auto* weight = static_cast<const typename Engine::Weight*>(args_.last_weights[e]);
    const T* bias = static_cast<const T*>(level_.biases[at]);
    constexpr int64_t tile_group = Engine::kRows * kGroup;
    const int64_t tiles = Engine::tiles(width);
    load_input(l - 1, e);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
      Ahead ahead;
      if (t + 1 < tiles) {
        ahead = Engine::weight_rows(weight, ld, depth, o + n, Engine::tile_begin(width, t + 2) - o - n);
      }
      for (int64_t g0 = 0; g0 < groups_; g0 += Engine::kGroups) {
        const int64_t ng = groups_ - g0 < Engine::kGroups ? groups_ - g0 : Engine::kGroups;
        Engine::tile(weight, ld, o, n, s_.input + g0 * size, depth, ng, s_.tile, tile_group,
                     ahead.share(g0, ng, groups_));
        for (int64_t g = g0; g < g0 + ng; ++g) {
          bias_activation<T, C>(from_input(code) ? static_cast<int>(kNone) : code, s_.tile + (g - g0) * tile_group,
                                bias ? bias + o : nullptr, n, s_.kept + (g * width + o) * kGroup, nullptr);
        }
      }
    }
  }

  void expert(int e) {
    const int last = level_.layers - 1;
    last < saved_layers(level_) ? load_kept(last, e) : compute_kept(e);
    for (int64_t g = 0; g < groups_; ++g) last_layer(e, g);
    if (!args_.need_chain()) return;
    for (int l = last; l > 0; --l) {
      const int code = level_.activations[l - 1];
      const int64_t width = level_.widths[l], size = Engine::panel_size(width);
      const C* kept = l == last ? loaded(code) : nullptr;
      if (!kept) load_kept(l - 1, e);
      if (!kept) kept = s_.kept;
      start_panels(l - 1);
      down(e, l, [&](int64_t g, int64_t o, int64_t n, C* tile) {
        C* place = Engine::destination(panels(l - 1) + g * size, o, tile);
        times_derivative(code, tile, kept + (g * width + o) * kGroup, n, place);
        finish_gradient(l - 1, g, o, n, place);
      });
    }
    if (args_.grad_inputs) {
      down(e, 0, [&](int64_t g, int64_t o, int64_t n, const C* tile) {
        C* place = s_.below + (g * level_.widths[0] + o) * kGroup;
        for (int64_t i = 0; i < n * kGroup; i += Simd<C>::lanes) {
          mtlk::MTLK_ISA::store(place + i, load(place + i) + load(tile + i));
        }
      });
    }
  }

  void start_panels(int l) {
    const int64_t width = level_.widths[l + 1];
    for (int64_t g = 0; g < groups_; ++g) Engine::clear_margin(panels(l) + g * Engine::panel_size(width), width);
  }

  void finish_gradient(int l, int64_t g, int64_t o, int64_t n, const C* values) {
    const int64_t width = level_.widths[l + 1];
    Engine::store(panels(l) + g * Engine::panel_size(width), o, n, values);
    Engine::store_gradient(gradients(l), width, g, o, n, values);
  }

  // From layer l's gradients to those of what it read: f(group, feature, n, tile) for each tile.
  template <typename F>
  void down(int e, int l, F f) {
    const int64_t depth = level_.widths[l + 1], width = level_.widths[l];
    const int64_t at = static_cast<int64_t>(l) * level_.experts + e;
    const auto* weight = static_cast<const typename Engine::Weight*>(level_.weights[at]);
    const Element* in = panels(l);
    constexpr int64_t tile_group = Engine::kRows * kGroup;
    const int64_t tiles = Engine::tiles(width);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
      Ahead ahead;  // a weight that is not transposed lies in too many pieces
      if (Engine::kBackwardTransposed && t + 1 < tiles) {
        ahead =
            Engine::weight_rows(weight, level_.weight_ld[at], depth, o + n, Engine::tile_begin(width, t + 2) - o - n);
      }
      for (int64_t g0 = 0; g0 < groups_; g0 += Engine::kGroups) {
        const int64_t ng = groups_ - g0 < Engine::kGroups ? groups_ - g0 : Engine::kGroups;
        Engine::tile_back(weight, level_.weight_ld[at], o, n, in + g0 * Engine::panel_size(depth), depth, ng, s_.tile,
                          tile_group, ahead.share(g0, ng, groups_));
        for (int64_t g = g0; g < g0 + ng; ++g) f(g, o, n, s_.tile + (g - g0) * tile_group);
      }
    }
  }

  static void times_derivative(int code, const C* grad, const C* kept, int64_t n, C* out) {
    with_activation(code, [&](auto constant) {
      for (int64_t i = 0; i < n * kGroup; i += Simd<C>::lanes) {
        mtlk::MTLK_ISA::store(out + i, load(grad + i) * derivative<decltype(constant)::value, C>(load(kept + i)));
      }
    });
  }

  // One group of an expert's outputs: <dy, output> for every gate that mixes it, and the last layer's gradient.
  void last_layer(int e, int64_t g) {
    constexpr int L = Simd<C>::lanes;
    const Gates& gates = level_.gates;
    const int l = level_.layers - 1, code = level_.activations[l];
    const int64_t values = features() * kGroup;
    const C* kept = s_.kept + g * values;
    const C* after = kept;
    if (from_input(code)) {
      with_activation(code, [&](auto constant) {
        for (int64_t i = 0; i < values; i += L) {
          mtlk::MTLK_ISA::store(s_.after + i, activate<decltype(constant)::value, C>(load(kept + i)));
        }
      });
      after = s_.after;
    }
    std::memset(s_.whole, 0, values * sizeof(C));
    for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
      const GateUse use = gates.uses[u];
      const int64_t column = (g * gates.columns + use.column) * kGroup;
      const C* grad = s_.grad_outputs + (use.gate * groups_ + g) * values;
      add_weighted(s_.probabilities + column, grad, features(), s_.whole);
      dot_lanes(grad, after, s_.inner + column);
    }
    if (!args_.need_chain()) return;
    const int64_t size = Engine::panel_size(features());
    if (g == 0) start_panels(l);
    C* place = Engine::destination(panels(l) + g * size, 0, s_.whole);
    times_derivative(code, s_.whole, kept, features(), place);
    finish_gradient(l, g, 0, features(), place);
  }

  void dot_lanes(const C* a, const C* b, C* out) const {
    constexpr int L = Simd<C>::lanes;
    constexpr int P = Simd<C>::per_group;
    for (int j = 0; j < P; ++j) {
      Vector<C> sum[4] = {};
      for (int64_t i = 0; i < features(); ++i)
        sum[i % 4] += load(a + i * kGroup + j * L) * load(b + i * kGroup + j * L);
      mtlk::MTLK_ISA::store(out + j * L, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }

  int64_t stream_size() const { return level_.widths[0] * groups_ * kGroup; }

  void leave_inputs(int stream) {
    if (!args_.grad_inputs) return;
    if (!below_ || args_.divided[stream] < 0) return write_inputs(stream);
    C* const place = below_ + args_.divided[stream] * stream_size();
    for (int64_t i = 0; i < stream_size(); i += Simd<C>::lanes) {
      mtlk::MTLK_ISA::store(place + i, load(place + i) + load(s_.below + i));
    }
  }

  void write_inputs(int stream) {
    const int64_t width = level_.widths[0];
    T* rows = static_cast<T*>(args_.grad_inputs[stream]) + row_ * width;
    for (int64_t g = 0; g < groups_; ++g) {
      unpack_panel(s_.below + g * width * kGroup, width, rows + g * kGroup * width, width, group_rows(g));
    }
  }

  void write_logits() {
    const Gates& gates = level_.gates;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t at = g * gates.columns * kGroup;
      for (int k = 0; k < gates.count; ++k) {
        write_logit_gradient(gates, k, s_.probabilities + at, s_.inner + at, row_ + g * kGroup, group_rows(g),
                             args_.grad_logits[k]);
      }
    }
  }

  const BackwardArgs& args_;
  const Level& level_;
  const BackwardChunk& chunk_;
  const BackwardLayout<Engine>& layout_;
  const int64_t row_, nrows_, groups_;
  BackwardScratch<Engine> s_;
  C* below_ = nullptr;
  int index_ = 0;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
