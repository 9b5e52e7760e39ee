// Weights made ready for a product while another one runs.
#pragma once

#include "gemm/planes.h"

namespace mtlk {
namespace MTLK_ISA {

// A weight as it lies in memory: the element of output o and input i is at data[o * row + i * column], one of the
// strides 1.
template <typename T>
struct NaturalWeight {
  const T* data;
  int64_t row, column;
};

// Makes a tile of weights in the form that products of pairs want, [output / 16][input / 32][plane][16][32] with zeros
// in the margins, a share at a time between the products of the tile before. Making consists of other instructions than
// multiplying, so that a processor with matrix instructions does both at once.
template <typename T>
class TileMaker {
  using Split = Planes<T>;

 public:
  // Outputs [0, n) of `weight`; `turns` is how many shares there may be.
  TileMaker(const NaturalWeight<T>& weight, int64_t n, int64_t depth, int64_t turns, BFloat16* out)
      : weight_(weight), left_(n), depth_(depth), steps_((depth + kPairStep - 1) / kPairStep), out_(out) {
    total_ = group_count(n) * steps_ * kGroup;
    share_ = turns > 0 ? (total_ + turns - 1) / turns : total_;
    begin_strip();
  }

  MTLK_INLINE void step() {
    due_ += share_;
    while (made_ < due_ && made_ < total_) {
      if (in_rows_ > 0) {
        const int64_t n = due_ - made_ < in_rows_ ? due_ - made_ : in_rows_;
        make_rows(n);
        made_ += n;
        in_rows_ -= n;
      } else {
        if (made_ + kGroup > due_) return;
        make_block();
        made_ += kGroup;
      }
      if (in_rows_ == 0 && block_ == steps_) next_strip();
    }
  }

  void finish() {
    due_ = total_;
    step();
  }

 private:
  static constexpr int64_t kBlock = Split::kPlanes * kPairTile;

  // A strip is 16 outputs. Whole steps of contiguous rows are made along the rows, which the hardware's prefetchers
  // follow, in small shares; what remains, and any other strip, in blocks of 16 rows.
  void begin_strip() {
    whole_ = weight_.column == 1 && left_ >= kGroup ? depth_ / kPairStep : 0;
    in_rows_ = whole_ * kGroup;
    block_ = whole_;
    step_ = 0;
    from_ = weight_.data;
    to_ = out_;
  }

  void next_strip() {
    out_ += steps_ * kBlock;
    left_ -= kGroup;
    weight_.data += kGroup * weight_.row;
    begin_strip();
  }

  // Without a branch at the end of a row: it would be mispredicted, and what a processor has begun of the next products
  // with it.
  MTLK_INLINE void make_rows(int64_t n) {
    const T* from = from_;
    BFloat16* to = to_;
    int64_t step = step_;
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (Split::kPlanes == 1) {
        _mm512_storeu_si512(to, _mm512_loadu_si512(from));
      } else {
        Split::template split_row<true>(load_wide(from), load_wide(from + kGroup), to);
      }
      const bool ends = ++step == whole_;
      from += ends ? weight_.row - (whole_ - 1) * kPairStep : kPairStep;
      to += ends ? kPairStep - (whole_ - 1) * kBlock : kBlock;
      step = ends ? 0 : step;
    }
    from_ = from;
    to_ = to;
    step_ = step;
  }

  __attribute__((noinline)) void make_block() {
    const int64_t column = block_ * kPairStep, width = depth_ - column < kPairStep ? depth_ - column : kPairStep;
    Split::template split_rows<true>(weight_.data + column * weight_.column, weight_.row, weight_.column,
                                     left_ < kGroup ? left_ : kGroup, width, out_ + block_ * kBlock);
    ++block_;
  }

  NaturalWeight<T> weight_;
  int64_t left_, depth_, steps_;
  BFloat16* out_;                               // of the strip
  int64_t total_, share_, made_ = 0, due_ = 0;  // in rows of a step
  int64_t whole_, in_rows_, block_, step_;
  const T* from_;
  BFloat16* to_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
