// The backward pass of a chain.
//
// It runs over blocks of rows, in cache: gradients of the outputs -> of the gates' logits and the last
// pre-activations -> down the layers -> of the inputs, summed over the experts that read them. It leaves the gradients
// of the pre-activations of a chunk of rows; the weights' gradients then take the batch as the depth of their GEMM.
#pragma once

#include "level/chain_backward_scratch.h"
#include "level/chain_forward_kernels.h"
#include "level/chain_signs_kernels.h"
#include "level/products_below.h"
#include "level/weighing.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
class ChainBackward : RowBlock<ChainBackwardArgs> {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  using Gradient = typename Engine::Gradient;

  // Rows [row, row + nrows) of the batch, which lie in the chunk.
  ChainBackward(const ChainBackwardArgs& args, const BackwardChunk& chunk, const BackwardLayout<Engine>& layout,
                int64_t row, int64_t nrows, void* memory)
      : RowBlock(args, row, nrows), chunk_(chunk), layout_(layout), s_(args.level, groups_, memory) {}

  static int64_t bytes(const LevelShape& level, int64_t nrows) {
    return ChainBackwardScratch<Engine>(level, group_count(nrows), nullptr).total;
  }
  static int64_t stream_size(const LevelShape& level, int64_t nrows) {
    return stream_sums<Engine>(level, group_count(nrows));
  }

  static int64_t gates_bytes(const LevelShape& level, int64_t nrows) {
    const int64_t groups = group_count(nrows);
    return ChainBackwardScratch<Engine>(level, groups, nullptr).point_gates(level, groups, nullptr);
  }

  // Experts order[first] up to order[last].
  void run(int first, int last, const BackwardPart& part) {
    below_ = static_cast<C*>(part.sums);
    if (part.inner) s_.inner = static_cast<C*>(part.inner);
    s_.point_gates(level_, groups_, part.gates);
    if (!part.made) make_gates();
    if (below_ && !part.add) clear_others(first, last);
    int stream = -1;
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i];
      if (level_.expert_inputs[e] != stream) {
        if (stream >= 0) leave_inputs(stream);
        stream = level_.expert_inputs[e];
        stream_ = divided(stream) ? below_ + args_.divided[stream] * stream_size() : s_.below;
        fresh_ = !part.add || !divided(stream);
      }
      index_ = i - chunk_.first;
      expert(e, i + 1 < last ? level_.order[i + 1] : -1);
    }
    leave_inputs(stream);
    if (!part.inner && args_.grad_logits) write_logits();
  }

  // Sums the inputs' gradients of `parts` parts in their order, from the first one's.
  void finish(const BackwardPart& first, int parts) {
    const int64_t size = args_.divided_count * stream_size();
    s_.point_gates(level_, groups_, first.gates);
    s_.inner = static_cast<C*>(first.inner);
    if (args_.grad_logits) {
      if (!first.made) make_probabilities();
      write_logits();
    }
    int stream = -1;
    for (int i = 0; args_.grad_inputs && i < level_.experts; ++i) {
      if (level_.expert_inputs[level_.order[i]] == stream) continue;
      stream = level_.expert_inputs[level_.order[i]];
      if (args_.divided[stream] < 0) continue;
      const C* const sums = static_cast<const C*>(first.sums) + args_.divided[stream] * stream_size();
      for (int64_t at = 0; parts > 1 && at < stream_size(); at += Simd<C>::lanes) {
        Vector<C> sum = load(sums + at);
        for (int p = 1; p < parts; ++p) sum += load(sums + p * size + at);
        mtlk::MTLK_ISA::store(s_.below + at, sum);
      }
      write_inputs(stream, parts > 1 ? s_.below : sums);
    }
  }

 private:
  void make_probabilities() const {
    for (int64_t g = 0; g < groups_; ++g) {
      gate_probabilities(level_.gates, row(g), group_rows(g), s_.probabilities + g * level_.gates.columns * kGroup);
    }
  }

  void make_gates() const {
    make_probabilities();
    for (int64_t g = 0; g < groups_; ++g) {
      for (int k = 0; k < level_.gates.count; ++k) {
        const int64_t ld = args_.grad_output_ld[k];
        pack_panel(static_cast<const T*>(args_.grad_outputs[k]) + row(g) * ld, ld, group_rows(g), features(),
                   s_.grad_outputs + (k * groups_ + g) * features() * kGroup);
      }
    }
  }

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

  const T* saved_rows(int l, int e) const {
    return static_cast<const T*>(args_.saved[l]) +
           (saved_place(level_, l, e) * level_.rows + row_) * level_.widths[l + 1];
  }

  void load_kept(int l, int e) {
    const int64_t width = level_.widths[l + 1];
    const T* rows = saved_rows(l, e);
    for (int64_t g = 0; g < groups_; ++g) {
      pack_panel(rows + g * kGroup * width, width, group_rows(g), width, s_.kept + g * width * kGroup);
    }
  }

  // The panel of a group of a saved last layer.
  const C* last_kept(int e, int64_t g) {
    const int64_t values = features() * kGroup;
    const T* const place = saved_rows(level_.layers - 1, e) + g * values;
    if (group_rows(g) < kGroup) {
      pack_panel(place, features(), group_rows(g), features(), s_.kept);
    } else if constexpr (__is_same(T, C)) {
      return place;
    } else {
      widen(place, s_.kept, values);
    }
    return s_.kept;
  }

  // What a saved layer's activation gave.
  void load_input(int l, int e) {
    const int64_t width = level_.widths[l + 1], size = Engine::panel_size(width);
    if (!from_input(level_.activations[l])) {
      const T* rows = saved_rows(l, e);
      for (int64_t g = 0; g < groups_; ++g) {
        if (g + 1 < groups_) fetch_rows(rows + (g + 1) * kGroup * width, group_rows(g + 1) * width);
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

  void load_signs(int l, int e) {
    const int64_t width = level_.widths[l + 1];
    const T* rows = saved_rows(l, e);
    for (int64_t g = 0; g < groups_; ++g) {
      make_signs<C>(rows + g * kGroup * width, width, group_rows(g), s_.signs + g * sign_words_size(width));
    }
  }

  // What would have been saved of the last layer, from the one below. Its activation is one of which signs suffice.
  void compute_kept(int e) {
    const int l = level_.layers - 1;
    const int64_t depth = level_.widths[l], width = level_.widths[l + 1], size = Engine::panel_size(depth);
    const int64_t at = weight_number(level_, l, e), ld = args_.last_weight_ld[e];
    const auto* weight = static_cast<const typename Engine::Weight*>(args_.last_weights[e]);
    const auto affine = Affine<T, C>::of(level_, at);
    constexpr int64_t tile_group = Engine::kRows * kGroup;
    const int64_t tiles = Engine::tiles(width);
    load_input(l - 1, e);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
      Prefetch ahead;
      if (t + 1 < tiles) {
        ahead = Engine::weight_rows(weight, ld, depth, o + n, Engine::tile_begin(width, t + 2) - o - n);
      }
      for (int64_t g0 = 0; g0 < groups_; g0 += Engine::kGroups) {
        const int64_t ng = groups_ - g0 < Engine::kGroups ? groups_ - g0 : Engine::kGroups;
        Engine::tile(weight, ld, o, n, s_.input + g0 * size, depth, ng, s_.tile, tile_group,
                     ahead.share(g0, ng, groups_));
        for (int64_t g = g0; g < g0 + ng; ++g) {
          affine_activation<T, C>(level_.activations[l], s_.tile + (g - g0) * tile_group, affine.from(o), n,
                                  s_.kept + (g * width + o) * kGroup, nullptr);
          clear_absent(group_rows(g), n, s_.kept + (g * width + o) * kGroup);
        }
      }
    }
  }

  void expert(int e, int next) {
    const int last = level_.layers - 1;
    const bool saved = saved_place(level_, last, e) >= 0, done = !saved && last_from_signs(e);
    if (!done) {
      if (!saved) compute_kept(e);
      for (int64_t g = 0; g < groups_; ++g) {
        last_layer(e, g, saved ? last_kept(e, g) : s_.kept + g * features() * kGroup);
      }
    }
    if (!args_.need_experts) return;
    for (int l = done ? last - 1 : last; l > 0; --l) {
      // Where the last layer was computed again, what it read is there.
      const bool there = l == last && !saved, signs = !there && level_.activations[l - 1] == kRelu;
      if (signs) {
        load_signs(l - 1, e);
      } else if (from_input(level_.activations[l - 1])) {
        load_kept(l - 1, e);
      } else if (!there) {
        load_input(l - 1, e);
      }
      start_panels(l - 1);
      multiply_below<Engine>(level_, l, e, panels(l), groups_, s_.tile, [&](int64_t g, int64_t o, int64_t n, C* tile) {
        clear_absent(group_rows(g), n, tile);  // where an infinite weight has made NaN of zeros
        signs ? relu_gradients(l - 1, g, o, n, tile) : hidden_gradients(l - 1, g, o, n, tile);
      });
    }
    if (!args_.grad_inputs) return;
    add_to_stream<Engine>(level_, e, panels(0), groups_, stream_, !fresh_, next < 0 ? Prefetch{} : saved_of(next));
    fresh_ = false;
  }

  // What the pass reads of an expert's layer below the last.
  Prefetch saved_of(int e) const {
    const int l = level_.layers - 2;
    if (l < 0) return {};
    return {reinterpret_cast<const char*>(saved_rows(l, e)),
            nrows_ * level_.widths[l + 1] * static_cast<int64_t>(sizeof(T))};
  }

  void start_panels(int l) {
    const int64_t width = level_.widths[l + 1];
    for (int64_t g = 0; g < groups_; ++g) Engine::clear_margin(panels(l) + g * Engine::panel_size(width), width);
  }

  // The gradients of n pre-activations from those of their activations. What the derivative follows from lies in
  // s_.kept or s_.input.
  void hidden_gradients(int l, int64_t g, int64_t o, int64_t n, const C* grad) {
    const int64_t width = level_.widths[l + 1], size = Engine::panel_size(width);
    with_activation(level_.activations[l], [&](auto constant) {
      constexpr int kCode = decltype(constant)::value;
      const C* const kept = s_.kept + (g * width + o) * kGroup;
      const Element* const panel = s_.input + g * size;
      Engine::store_gradients(panels(l) + g * size, gradients(l), width, g, o, n, [&](int64_t i, int j) {
        const Vector<C> s = from_input(kCode) ? load(kept + i * kGroup + j) : Engine::load_panel(panel, o + i, j);
        return activation_gradient<kCode, C>(load(grad + i * kGroup + j), s);
      });
    });
  }

  // The same of relu, from s_.signs.
  void relu_gradients(int l, int64_t g, int64_t o, int64_t n, const C* grad) {
    const int64_t width = level_.widths[l + 1];
    const Word<C>* const words = s_.signs + g * sign_words_size(width);
    Engine::store_gradients(panels(l) + g * Engine::panel_size(width), gradients(l), width, g, o, n,
                            [&](int64_t i, int j) {
                              const Vector<C> value = load(grad + i * kGroup + j);
                              return has_sign(words, o + i, j) ? value : Vector<C>{};
                            });
  }

  // Whether expert e's last two layers have their gradients, and its gate's probability what it wants, from signs.
  bool last_from_signs([[maybe_unused]] int e) {
    if constexpr (Engine::kFromSigns) {
      const int l = level_.layers - 1, first = level_.gates.use_begin[e];
      if (!args_.from_signs || level_.gates.use_begin[e + 1] != first + 1) return false;
      load_input(l - 1, e);
      Element* passed;
      if constexpr (Engine::kGradientIsPanel) {
        passed = s_.kept;
      } else {
        passed = panels(l);
      }
      return LastFromSigns<Engine>(args_, row_, nrows_, s_, e, passed, gradients(l), gradients(l - 1), panels(l - 1))
          .run();
    }
    return false;
  }

  // One group of an expert's outputs: <dy, output> for every gate that mixes it, and the last layer's gradient.
  void last_layer(int e, int64_t g, const C* kept) {
    constexpr int L = Simd<C>::lanes;
    const int l = level_.layers - 1, code = level_.activations[l];
    const int64_t values = features() * kGroup;
    const C* after = kept;
    if (from_input(code)) {
      with_activation(code, [&](auto constant) {
        for (int64_t i = 0; i < values; i += L) {
          mtlk::MTLK_ISA::store(s_.after + i, activate<decltype(constant)::value, C>(load(kept + i)));
        }
      });
      after = s_.after;
    }
    weigh(e, g, after);
    if (!args_.need_experts) return;
    const int64_t size = Engine::panel_size(features());
    if (g == 0) start_panels(l);
    with_activation(code, [&](auto constant) {
      Engine::store_gradients(panels(l) + g * size, gradients(l), features(), g, 0, features(), [&](int64_t i, int j) {
        const int64_t at = i * kGroup + j;
        return activation_gradient<decltype(constant)::value, C>(load(s_.whole + at), load(kept + at));
      });
    });
  }

  // For every gate that mixes expert e, <dy, output> of a group; and the outputs' gradient, s_.whole.
  void weigh(int e, int64_t g, const C* outputs) {
    const Gates& gates = level_.gates;
    const GateUse *use = gates.uses + gates.use_begin[e], *const end = gates.uses + gates.use_begin[e + 1];
    const int64_t column = g * gates.columns * kGroup, size = features() * kGroup;
    const Weighing<C> w{
        outputs,   s_.grad_outputs + g * size, groups_ * size, s_.probabilities + column, s_.inner + column, s_.whole,
        features()};
    if (use == end) std::memset(s_.whole, 0, size * sizeof(C));
    for (bool fresh = true; use < end; fresh = false) {
      if (use + 1 < end) {
        w.template run<2>(use, fresh);
        use += 2;
      } else {
        w.template run<1>(use++, fresh);
      }
    }
  }

  int64_t stream_size() const { return stream_size(level_, nrows_); }

  // Whether the stream's sums are of several parts.
  bool divided(int stream) const { return below_ && args_.grad_inputs && args_.divided[stream] >= 0; }

  // Zeroes the sums of the divided streams that none of experts order[first, last) reads.
  void clear_others(int first, int last) {
    for (int stream = 0; args_.grad_inputs && stream < stream_count(level_); ++stream) {
      bool reads = false;
      for (int i = first; i < last; ++i) reads = reads || level_.expert_inputs[level_.order[i]] == stream;
      if (reads || args_.divided[stream] < 0) continue;
      std::memset(below_ + args_.divided[stream] * stream_size(), 0, stream_size() * sizeof(C));
    }
  }

  void leave_inputs(int stream) {
    if (args_.grad_inputs && !divided(stream)) write_inputs(stream, s_.below);
  }

  void write_inputs(int stream, const C* sums) {
    write_stream<Engine>(level_, sums, row_, nrows_, args_.grad_inputs[stream]);
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

  const BackwardChunk& chunk_;
  const BackwardLayout<Engine>& layout_;
  ChainBackwardScratch<Engine> s_;
  C* below_ = nullptr;
  C* stream_ = nullptr;  // the sums that the experts' input gradients go to
  bool fresh_ = true;    // nothing is in them yet
  int index_ = 0;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
