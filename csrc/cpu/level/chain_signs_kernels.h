// The gradients of a last layer that was not saved, from its signs.
#pragma once

#include "level/chain_backward_scratch.h"
#include "level/row_block.h"

namespace mtlk {
namespace MTLK_ISA {

// Of a block of rows and an expert that one gate mixes: the gradients of the last two layers' pre-activations, `last`
// and `below`, and <dy, output>; see signs_suffice. What the layer below gave lies in s.input. Engines with natural
// weights have plain panels, of gradients too.
template <typename Engine>
class LastFromSigns : RowBlock<ChainBackwardArgs> {
 public:
  using C = typename Engine::C;

  LastFromSigns(const ChainBackwardArgs& args, int64_t row, int64_t nrows, const ChainBackwardScratch<Engine>& s, int e,
                C* last, C* below)
      : RowBlock(args, row, nrows),
        s_(s),
        e_(e),
        use_(level_.gates.uses[level_.gates.use_begin[e]]),
        last_(last),
        below_(below) {}

  // False where <dy, output> shows a number that is not finite. It would spread otherwise than through the output: all
  // has to be done again from that.
  bool run() const {
    const int l = level_.layers - 1;
    for (int64_t g = 0; g < groups_; ++g) start(g);
    multiply_below<Engine>(level_, l, e_, s_.kept, groups_, s_.tile, [&](int64_t g, int64_t o, int64_t n, C* tile) {
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
  int64_t column(int64_t g) const { return (g * level_.gates.columns + use_.column) * kGroup; }
  C* inner(int64_t g) const { return s_.inner + column(g); }

  // dy where the activation passes a gradient, to s.kept; the same times the probability, to the last layer's
  // gradients; and <dy, output> begins with the biases' part. Products with 0 are added where no others are, so that
  // it shows what is not finite.
  void start(int64_t g) const {
    const int64_t width = features(), size = width * kGroup;
    const auto* bias = static_cast<const C*>(level_.biases[weight_number(level_, level_.layers - 1, e_)]);
    const C* const dy = s_.grad_outputs + (use_.gate * groups_ + g) * size;
    C* const passed = s_.kept + g * size;
    C* const weighed = last_ + g * size;
    if (args_.signs) {
      const int64_t first = level_.numbers[e_] * level_.rows + row(g);
      load_signs(args_.signs + first * sign_bytes(width), width, group_rows(g), s_.signs);
    } else {
      std::memset(s_.signs, 0xff, sign_words_size(width) * sizeof(Word<C>));
    }
    for (int j = 0; j < kGroup; j += Simd<C>::lanes) {
      const Vector<C> zero{}, p = load(s_.probabilities + column(g) + j);
      Vector<C> sum = p * zero;
      for (int64_t w = 0; w < width; w += 32) {
        const Vector<Word<C>> word = load(s_.signs + w / 32 * kGroup + j);
        Vector<Word<C>> bit = broadcast<Word<C>>(1);
        for (int64_t i = w; i < width && i < w + 32; ++i, bit += bit) {
          const auto passes = (word & bit) != 0;
          const Vector<C> grad = load(dy + i * kGroup + j);
          const Vector<C> d = passes ? grad : zero;
          sum += grad * (passes ? broadcast(bias ? bias[i] : static_cast<C>(0)) : zero);
          mtlk::MTLK_ISA::store(passed + i * kGroup + j, d);
          mtlk::MTLK_ISA::store(weighed + i * kGroup + j, p * d);
        }
      }
      mtlk::MTLK_ISA::store(inner(g) + j, sum);
    }
  }

  // The gradients of n pre-activations below from u, and their part of <dy, output>.
  template <int Code>
  void go_on(int64_t g, int64_t o, int64_t n, const C* u) const {
    const int64_t first = (g * level_.widths[level_.layers - 1] + o) * kGroup;
    for (int j = 0; j < kGroup; j += Simd<C>::lanes) {
      const Vector<C> p = load(s_.probabilities + column(g) + j);
      Vector<C> sum{};
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i * kGroup + j;
        const Vector<C> grad = load(u + at), h = load(s_.input + first + at);
        sum += grad * h;
        mtlk::MTLK_ISA::store(below_ + first + at, activation_gradient<Code, C>(p * grad, h));
      }
      mtlk::MTLK_ISA::store(inner(g) + j, load(inner(g) + j) + sum);
    }
  }

  const ChainBackwardScratch<Engine>& s_;
  const int e_;
  const GateUse use_;
  C *const last_, *const below_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
