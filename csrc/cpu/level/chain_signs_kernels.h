// The gradients of a last layer that was not saved, from its signs.
#pragma once

#include "level/chain_backward_scratch.h"
#include "level/row_block.h"

namespace mtlk {
namespace MTLK_ISA {

// Of a block of rows and an expert that one gate mixes: the gradients of the last two layers' pre-activations, `last`
// and `below`, the latter's panels too, and <dy, output>; see signs_suffice. What the layer below gave lies in s.input,
// and `passed` has room for panels of the last layer.
template <typename Engine>
class LastFromSigns : RowBlock<ChainBackwardArgs> {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  using Gradient = typename Engine::Gradient;

  LastFromSigns(const ChainBackwardArgs& args, int64_t row, int64_t nrows, const ChainBackwardScratch<Engine>& s, int e,
                Element* passed, Gradient* last, Gradient* below, Element* below_panels)
      : RowBlock(args, row, nrows),
        s_(s),
        e_(e),
        use_(level_.gates.uses[level_.gates.use_begin[e]]),
        passed_(passed),
        last_(last),
        below_(below),
        below_panels_(below_panels) {}

  // False where <dy, output> shows a number that is not finite. It would spread otherwise than through the output: all
  // has to be done again from that.
  bool run() const {
    const int l = level_.layers - 1;
    for (int64_t g = 0; g < groups_; ++g) start(g);
    multiply_below<Engine>(level_, l, e_, passed_, groups_, s_.tile, [&](int64_t g, int64_t o, int64_t n, C* tile) {
      clear_absent(group_rows(g), n, tile);  // where an infinite weight has made NaN of their zeros
      with_activation(level_.activations[l - 1],
                      [&](auto constant) { go_on<decltype(constant)::value>(g, o, n, tile); });
    });
    Vector<C> rest{};
    for (int64_t g = 0; g < groups_; ++g) {
      for (int j = 0; j < kGroup; j += Simd<C>::lanes) rest += load(inner(g) + j) - load(inner(g) + j);
    }
    for (int j = 0; j < Simd<C>::lanes; ++j) {
      if (rest[j] != 0) return false;  // NaN, as the difference of infinities is
    }
    return true;
  }

 private:
  // A number for each row of a group.
  struct PerLane {
    Vector<C> of[Simd<C>::per_group];
    MTLK_INLINE Vector<C>& at(int j) { return of[j / Simd<C>::lanes]; }
  };
  PerLane probabilities(int64_t g) const {
    PerLane result;
    for (int j = 0; j < kGroup; j += Simd<C>::lanes) result.at(j) = load(s_.probabilities + column(g) + j);
    return result;
  }

  int64_t column(int64_t g) const { return (g * level_.gates.columns + use_.column) * kGroup; }
  C* inner(int64_t g) const { return s_.inner + column(g); }

  // dy where the activation passes a gradient, to panels; the same times the probability, to the last layer's
  // gradients; and <dy, output> begins with the biases' part. Products with 0 are added where no others are, so that
  // it shows what is not finite.
  void start(int64_t g) const {
    const int64_t width = features(), below = level_.widths[level_.layers - 1];
    const auto* bias = static_cast<const T*>(level_.biases[weight_number(level_, level_.layers - 1, e_)]);
    const C* const dy = s_.grad_outputs + (use_.gate * groups_ + g) * width * kGroup;
    Element* const panel = passed_ + g * Engine::panel_size(width);
    if (args_.signs) {
      load_signs(args_.signs + sign_offset(level_, e_, row(g)), width, group_rows(g), s_.signs);
    } else {
      std::memset(s_.signs, 0xff, sign_words_size(width) * sizeof(Word<C>));
    }
    const Vector<C> zero{};
    PerLane p = probabilities(g), sum;
    for (int k = 0; k < Simd<C>::per_group; ++k) sum.of[k] = p.of[k] * zero;
    Engine::clear_margin(panel, width);
    Engine::clear_margin(below_panels_ + g * Engine::panel_size(below), below);
    for (int64_t w = 0; w < width; w += 32) {
      const int64_t n = width - w < 32 ? width - w : 32;
      const auto passes = [&](int64_t i, int j) { return has_sign(s_.signs + w / 32 * kGroup, i, j); };
      Engine::store_each(panel, w, n, [&](int64_t i, int j) {
        const Vector<C> grad = load(dy + (w + i) * kGroup + j);
        const auto pass = passes(i, j);
        sum.at(j) +=
            grad * (pass ? broadcast(bias ? static_cast<C>(to_compute(bias[w + i])) : static_cast<C>(0)) : zero);
        return pass ? grad : zero;
      });
      Engine::keep_gradients(last_, width, g, w, n, [&](int64_t i, int j) {
        return p.at(j) * (passes(i, j) ? load(dy + (w + i) * kGroup + j) : zero);
      });
    }
    for (int j = 0; j < kGroup; j += Simd<C>::lanes) mtlk::MTLK_ISA::store(inner(g) + j, sum.at(j));
  }

  // The gradients of n pre-activations below from u, and their part of <dy, output>.
  template <int Code>
  void go_on(int64_t g, int64_t o, int64_t n, const C* u) const {
    const int64_t width = level_.widths[level_.layers - 1], first = g * Engine::panel_size(width);
    PerLane p = probabilities(g), sum{};
    Engine::store_gradients(below_panels_ + first, below_, width, g, o, n, [&](int64_t i, int j) {
      const Vector<C> grad = load(u + i * kGroup + j), h = Engine::load_panel(s_.input + first, o + i, j);
      sum.at(j) += grad * h;
      return activation_gradient<Code, C>(p.at(j) * grad, h);
    });
    for (int j = 0; j < kGroup; j += Simd<C>::lanes) {
      mtlk::MTLK_ISA::store(inner(g) + j, load(inner(g) + j) + sum.at(j));
    }
  }

  const ChainBackwardScratch<Engine>& s_;
  const int e_;
  const GateUse use_;
  Element* const passed_;
  Gradient *const last_, *const below_;
  Element* const below_panels_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
