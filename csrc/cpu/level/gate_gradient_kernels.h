// The gradients of gates that are linear layers: products too narrow for what a GEMM prepares.
#pragma once

#include "level/level_args.h"
#include "simd/prefetch.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// Of the gates of one stream, some of its features at a time, for all rows. Sums are sums of those of kRows rows.
template <typename T>
class GateGradients {
 public:
  using C = Compute<T>;
  static constexpr int kVectors = 2, kSums = Simd<C>::lanes * sizeof(C) == 64 ? 8 : 4;  // as registers have room for
  static constexpr int64_t kFeatures = kVectors * Simd<C>::lanes;

  static int64_t joined_ld(int64_t columns) { return (columns + kSums - 1) / kSums * kSums; }
  static int64_t bytes(int64_t columns) {
    return 2 * Arena::bytes<C>(joined_ld(columns) * kFeatures) + Arena::bytes<C>(kRows * kFeatures);
  }

  // The gates' logits' gradients next to each other, zeros in the margin.
  static void join(const GateGradientArgs& args, int64_t row, int64_t nrows) {
    const int64_t ld = joined_ld(args.columns);
    for (int64_t r = row; r < row + nrows; ++r) {
      C* out = static_cast<C*>(args.joined) + r * ld;
      int64_t column = 0;
      for (int k = 0; k < args.gates; column += args.sizes[k++]) {
        widen(static_cast<const T*>(args.grad_logits[k]) + r * args.sizes[k], out + column, args.sizes[k]);
      }
      for (; column < ld; ++column) out[column] = 0;
    }
  }

  GateGradients(const GateGradientArgs& args, int64_t feature, void* memory)
      : args_(args),
        joined_(static_cast<const C*>(args.joined)),
        ld_(joined_ld(args.columns)),
        feature_(feature),
        n_(args.width - feature < kFeatures ? args.width - feature : kFeatures) {
    Arena arena(memory);
    weights_ = arena.take<C>(ld_ * kFeatures);
    sums_ = arena.take<C>(ld_ * kFeatures);
    input_ = arena.take<C>(kRows * kFeatures);
  }

  void run() const {
    std::memset(weights_, 0, ld_ * kFeatures * sizeof(C));
    std::memset(sums_, 0, ld_ * kFeatures * sizeof(C));
    std::memset(input_, 0, kRows * kFeatures * sizeof(C));
    for (int64_t c = 0; c < args_.columns; ++c) {
      widen(static_cast<const T*>(args_.weights[c]) + feature_, weights_ + c * kFeatures, n_);
    }
    for (int64_t row = 0; row < args_.rows; row += kRows) {
      const int64_t nrows = args_.rows - row < kRows ? args_.rows - row : kRows;
      if (args_.grad_weights) add_to_sums(row, nrows);
      if (args_.grad_input) add_to_input(row, nrows);
    }
    for (int64_t c = 0; args_.grad_weights && c < args_.columns; ++c) {
      narrow(sums_ + c * kFeatures, static_cast<T*>(args_.grad_weights[c]) + feature_, n_);
    }
  }

  static void biases(const GateGradientArgs& args) {
    const int64_t ld = joined_ld(args.columns);
    for (int64_t c = 0; c < args.columns; c += kSums) {
      C sums[kSums] = {};
      for (int64_t row = 0; row < args.rows; row += kRows) {
        const int64_t end = row + kRows < args.rows ? row + kRows : args.rows;
        C part[kSums] = {};
        for (int64_t r = row; r < end; ++r) {
          for (int i = 0; i < kSums; ++i) part[i] += static_cast<const C*>(args.joined)[r * ld + c + i];
        }
        for (int i = 0; i < kSums; ++i) sums[i] += part[i];
      }
      for (int i = 0; i < kSums && c + i < args.columns; ++i) {
        if (args.grad_biases[c + i]) narrow(sums + i, static_cast<T*>(args.grad_biases[c + i]), 1);
      }
    }
  }

 private:
  static constexpr int64_t kRows = 64;  // that go together, so that what is read of them stays in the first cache
  using Sums = Vector<C>[kSums][kVectors];

  void add_to_sums(int64_t row, int64_t nrows) const {
    constexpr int L = Simd<C>::lanes;
    const T* rows = static_cast<const T*>(args_.input) + row * args_.input_ld + feature_;
    for (int64_t r = 0; r < nrows; ++r) {
      fetch_rows(rows + (r + kRows) * args_.input_ld, n_);
      widen(rows + r * args_.input_ld, input_ + r * kFeatures, n_);
    }
    for (int64_t c = 0; c < ld_; c += kSums) {
      C* const place = sums_ + c * kFeatures;
      Sums sums = {};
      for (int64_t r = 0; r < nrows; ++r) {
        const C* grad = joined_ + (row + r) * ld_ + c;
        each([&](int i, int v) { sums[i][v] += grad[i] * load(input_ + r * kFeatures + v * L); });
      }
      each([&](int i, int v) {
        C* const sum = place + i * kFeatures + v * L;
        mtlk::MTLK_ISA::store(sum, load(sum) + sums[i][v]);
      });
    }
  }

  void add_to_input(int64_t row, int64_t nrows) const {
    constexpr int L = Simd<C>::lanes;
    T* const rows = static_cast<T*>(args_.grad_input) + row * args_.width + feature_;
    for (int64_t r = 0; r < nrows; r += kSums) {
      const int64_t count = nrows - r < kSums ? nrows - r : kSums;
      C block[kSums * kFeatures] = {};
      for (int64_t i = 0; i < count; ++i) {
        fetch_rows(rows + (r + i + kRows) * args_.width, n_);
        widen(rows + (r + i) * args_.width, block + i * kFeatures, n_);
      }
      const C* grad[kSums];  // of rows that are not there, the last one's
      for (int i = 0; i < kSums; ++i) grad[i] = joined_ + (row + r + (i < count ? i : count - 1)) * ld_;
      Sums sums;
      each([&](int i, int v) { sums[i][v] = load(block + i * kFeatures + v * L); });
      for (int64_t c = 0; c < args_.columns; ++c) {
        each([&](int i, int v) { sums[i][v] += grad[i][c] * load(weights_ + c * kFeatures + v * L); });
      }
      each([&](int i, int v) { mtlk::MTLK_ISA::store(block + i * kFeatures + v * L, sums[i][v]); });
      for (int64_t i = 0; i < count; ++i) narrow(block + i * kFeatures, rows + (r + i) * args_.width, n_);
    }
  }

  // f(i, v) for each of a block's sums.
  template <typename F>
  MTLK_INLINE static void each(F f) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) f(i, v);
    }
  }

  const GateGradientArgs& args_;
  const C* const joined_;
  const int64_t ld_, feature_, n_;
  C *weights_, *sums_, *input_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
