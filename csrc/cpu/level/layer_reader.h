// Reading a normalised layer: its pre-activations become normalised values, those its outputs; and its statistics.
#pragma once

#include "gemm/panels.h"
#include "level/level_args.h"
#include "simd/activations.h"
#include "simd/philox.h"

namespace mtlk {
namespace MTLK_ISA {

// Channels are padded to this many, so that vectors and tiles may reach beyond the last.
constexpr int64_t kChannels = 32;
inline int64_t padded_channels(int64_t channels) { return (channels + kChannels - 1) / kChannels * kChannels; }

template <typename C>
MTLK_INLINE C sum_lanes(Vector<C> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_reduce_add_ps((__m512)x);
  if constexpr (sizeof(C) == 8) return _mm512_reduce_add_pd((__m512d)x);
#endif
  C lane[Simd<C>::lanes];
  store(lane, x);
  for (int half = Simd<C>::lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Mean and biased variance over the features of each of a group's rows.
template <typename C>
void row_moments(const C* values, int64_t features, C* mean, C* variance) {
  constexpr int L = Simd<C>::lanes;
  const C count = static_cast<C>(features);
  for (int j = 0; j < kGroup; j += L) {
    Vector<C> sum[4] = {};
    for (int64_t i = 0; i < features; ++i) sum[i % 4] += load(values + i * kGroup + j);
    const Vector<C> m = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / count;
    Vector<C> squares[4] = {};
    for (int64_t i = 0; i < features; ++i) {
      const Vector<C> x = load(values + i * kGroup + j) - m;
      squares[i % 4] += x * x;
    }
    store(mean + j, m);
    store(variance + j, ((squares[0] + squares[1]) + (squares[2] + squares[3])) / count);
  }
}

// Expert e's layer l as its readers see it.
template <typename T>
class LayerReader {
 public:
  using C = Compute<T>;
  static constexpr int L = Simd<C>::lanes;

  LayerReader(const LayerwiseArgs& args, int l, int e)
      : layer_(args.layers[l]),
        rows_(args.level.rows),
        width_(args.level.widths[l + 1]),
        expert_(e),
        number_(args.level.numbers[e]),
        code_(static_cast<int>(args.level.activations[l])),
        dropout_(layer_.rate, args.seed, l, args.level.numbers[e]) {}

  int norm() const { return layer_.norm; }
  bool has_sums() const { return layer_.norm != kNoNorm || layer_.activation_slope; }
  int code() const { return code_; }
  int64_t width() const { return width_; }
  bool drops() const { return layer_.rate > 0; }
  const Dropout& dropout() const { return dropout_; }
  C scale() const { return static_cast<C>(dropout_.scale()); }

  T* rows(int64_t row) const { return static_cast<T*>(layer_.z) + (number_ * rows_ + row) * width_; }
  const C* channels(const void* array) const { return static_cast<const C*>(array) + expert_ * layer_.ld; }
  const C* per_row(const void* array) const { return static_cast<const C*>(array) + expert_ * rows_; }
  const C* means() const { return static_cast<const C*>(layer_.mean) + number_ * rows_; }  // of a layer norm
  const NormLayer& layer() const { return layer_; }

  // A group's pre-activations, [width][16]; fetches those of the next group meanwhile.
  void load_group(int64_t row, int64_t nrows, C* z) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t f = 0; f < width_; f += kPairs) {
      const int64_t n = width_ - f < kPairs ? width_ - f : kPairs;
      const T* next = rows(row + kGroup) + f * kGroup;
      for (int64_t i = 0; i < n * kGroup; i += kLine) __builtin_prefetch(next + i, 0, 3);
      pack_panel(rows(row) + f, width_, nrows, n, z + f * kGroup);
    }
  }

  // Normalises features [o, o + n) of the group of rows [row, row + nrows): returns the values, in `out` unless there
  // is no norm. `centred` (or null) receives what the norm's gradient multiplies: z - mean a channel, zhat a row.
  const C* normalize(int64_t row, int64_t nrows, int64_t o, int64_t n, const C* z, C* out, C* centred) const {
    if (layer_.norm == kNoNorm) return z;
    const C *factor = channels(layer_.factor) + o, *shift = channels(layer_.shift) + o;
    if (layer_.norm == kBatchNorm) {
      const C* center = channels(layer_.center) + o;
      for (int64_t i = 0; i < n; ++i) {
        const Vector<C> c = broadcast(center[i]), f = broadcast(factor[i]), s = broadcast(shift[i]);
        for (int j = 0; j < kGroup; j += L) {
          const Vector<C> x = load(z + i * kGroup + j) - c;
          if (centred) store(centred + i * kGroup + j, x);
          store(out + i * kGroup + j, x * f + s);
        }
      }
      return present(nrows, n, out, centred);
    }
    C mean[kGroup], rstd[kGroup];
    copy_means(row, nrows, mean);
    copy_rows(layer_.rstd, row, nrows, rstd);
    for (int j = 0; j < kGroup; j += L) {
      const Vector<C> m = load(mean + j), r = load(rstd + j);
      for (int64_t i = 0; i < n; ++i) {
        const Vector<C> x = (load(z + i * kGroup + j) - m) * r;
        if (centred) store(centred + i * kGroup + j, x);
        store(out + i * kGroup + j, x * factor[i] + shift[i]);
      }
    }
    return present(nrows, n, out, centred);
  }

  // values(i, j) of the activation of normalised values, with dropout where `kept` is not null: given to f.
  template <typename F>
  MTLK_INLINE void activated(int64_t nrows, const C* n, const uint16_t* kept, F f) const {
    const C by = scale();
    C mean[kGroup], rate[kGroup];
    if (code_ == kDice) gate(nrows, n, mean, rate);
    with_any_activation(code_, [&](auto constant) {
      constexpr int kCode = decltype(constant)::value;
      const auto value = [&](int64_t i, int j) {
        const Vector<C> x = load(n + i * kGroup + j);
        if constexpr (kCode == kPrelu) return activate_with_slope<kCode, C>(x, slope(i), x, x);
        if constexpr (kCode == kDice) return activate_with_slope<kCode, C>(x, slope(i), load(mean + j), load(rate + j));
        return activate<kCode, C>(x);
      };
      if (kept) {
        f([&](int64_t i, int j) { return kept_lanes<C>(value(i, j), kept[i] >> j, by); });
      } else {
        f(value);
      }
    });
  }

  Vector<C> slope(int64_t i) const { return broadcast(channels(layer_.activation_slope)[i]); }

  // Mean and rate of Dice's gate for each of a group's rows, of which those that are not there get a rate of zero.
  void gate(int64_t nrows, const C* n, C* mean, C* rate) const {
    C variance[kGroup];
    row_moments(n, width_, mean, variance);
    for (int64_t r = 0; r < kGroup; ++r) {
      const double sum = (static_cast<double>(variance[r]) + layer_.dice_eps) * static_cast<double>(width_);
      rate[r] = r < nrows ? static_cast<C>(1.0 / std::sqrt(sum)) : static_cast<C>(0);
    }
  }

  // A value of each of a group's rows, zeros beyond.
  void copy_means(int64_t row, int64_t nrows, C* out) const { copy_present(means() + row, nrows, out); }
  void copy_rows(const void* array, int64_t row, int64_t nrows, C* out) const {
    copy_present(per_row(array) + row, nrows, out);
  }

 private:
  static void copy_present(const C* from, int64_t nrows, C* out) {
    for (int64_t r = 0; r < kGroup; ++r) out[r] = r < nrows ? from[r] : static_cast<C>(0);
  }

  // Rows that are not there must be finite, as they are multiplied by the zeros of their gradients.
  static const C* present(int64_t nrows, int64_t n, C* out, C* centred) {
    clear_absent(nrows, n, out);
    if (centred) clear_absent(nrows, n, centred);
    return out;
  }

  const NormLayer& layer_;
  const int64_t rows_, width_, expert_, number_;
  const int code_;
  const Dropout dropout_;
};

// Mean and sum of squared deviations over the rows of a block, for n channels of its panels.
template <typename C>
void channel_moments(const C* values, int64_t group, int64_t nrows, int64_t n, C* mean, C* squares) {
  constexpr int L = Simd<C>::lanes;
  const int64_t whole = nrows / kGroup, rest = nrows % kGroup;
  for (int64_t i = 0; i < n; ++i) {
    const C* first = values + i * kGroup;
    Vector<C> sum{};
    for (int64_t g = 0; g < whole; ++g) {
      for (int j = 0; j < kGroup; j += L) sum += load(first + g * group + j);
    }
    C total = sum_lanes<C>(sum);
    for (int64_t r = 0; r < rest; ++r) total += first[whole * group + r];
    const C m = total / static_cast<C>(nrows);
    sum = Vector<C>{};
    for (int64_t g = 0; g < whole; ++g) {
      for (int j = 0; j < kGroup; j += L) {
        const Vector<C> x = load(first + g * group + j) - m;
        sum += x * x;
      }
    }
    total = sum_lanes<C>(sum);
    for (int64_t r = 0; r < rest; ++r) {
      const C x = first[whole * group + r] - m;
      total += x * x;
    }
    mean[i] = m;
    squares[i] = total;
  }
}

// Where a block's contributions to the sums of an expert's layer lie: two arrays of its norm, then one of its slopes.
constexpr int kSlopeSum = 2;
template <typename C>
C* partials_of(const LayerwiseArgs& args, int64_t block, int e, int which) {
  const int64_t at = (block * args.level.experts + e) * args.partial_arrays + which;
  return static_cast<C*>(args.partials) + at * args.partial_ld;
}

inline int64_t rows_of_block(const LayerwiseArgs& args, int64_t block) {
  const int64_t left = args.level.rows - block * args.block_rows;
  return left < args.block_rows ? left : args.block_rows;
}

// f(first channel, count) for runs of channels that sums of doubles on the stack can hold.
constexpr int64_t kRun = 64;
template <typename F>
void each_run(int64_t channels, F f) {
  for (int64_t c = 0; c < channels; c += kRun) f(c, channels - c < kRun ? channels - c : kRun);
}

// Mean and biased variance of a batch norm from all blocks' moments, in double and in the blocks' order.
template <typename C>
void combine_moments(const LayerwiseArgs& args, int l, int e) {
  const NormLayer& layer = args.layers[l];
  const int64_t width = args.level.widths[l + 1];
  const double count = static_cast<double>(args.level.rows);
  C* const means = static_cast<C*>(layer.mean) + e * width;
  C* const variances = static_cast<C*>(layer.variance) + e * width;
  each_run(width, [&](int64_t c, int64_t n) {
    double mean[kRun] = {}, squares[kRun] = {};
    for (int64_t b = 0; b < args.blocks; ++b) {
      const C* m = partials_of<C>(args, b, e, 0) + c;
      const double share = static_cast<double>(rows_of_block(args, b)) / count;
      for (int64_t i = 0; i < n; ++i) mean[i] += share * static_cast<double>(m[i]);
    }
    for (int64_t b = 0; b < args.blocks; ++b) {
      const C *m = partials_of<C>(args, b, e, 0) + c, *s = partials_of<C>(args, b, e, 1) + c;
      const double rows = static_cast<double>(rows_of_block(args, b));
      for (int64_t i = 0; i < n; ++i) {
        const double x = static_cast<double>(m[i]) - mean[i];
        squares[i] += static_cast<double>(s[i]) + rows * x * x;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      means[c + i] = static_cast<C>(mean[i]);
      variances[c + i] = static_cast<C>(squares[i] / count);
    }
  });
}

template <typename C>
MTLK_INLINE double reciprocal_deviation(C variance, double eps) {
  return 1.0 / std::sqrt(static_cast<double>(variance) + eps);
}

// What the readers of expert e's layer l apply, from its statistics.
template <typename C>
void prepare_norm(const LayerwiseArgs& args, int l, int e) {
  const NormLayer& layer = args.layers[l];
  const int64_t width = args.level.widths[l + 1], rows = args.level.rows;
  if (layer.activation_slope) {
    const C* given = static_cast<const C*>(layer.activation_slopes[e]);
    C* const alpha = static_cast<C*>(layer.activation_slope) + e * layer.ld;
    for (int64_t c = 0; c < layer.ld; ++c) {
      alpha[c] = given && c < width ? given[c * layer.activation_slope_strides[e]] : static_cast<C>(1);
    }
  }
  if (layer.norm == kNoNorm) return;
  const int64_t number = args.level.numbers[e];
  const C *scale = static_cast<const C*>(layer.scales[e]), *shift = static_cast<const C*>(layer.shifts[e]);
  C* const factors = static_cast<C*>(layer.factor) + e * layer.ld;
  C* const shifts = static_cast<C*>(layer.shift) + e * layer.ld;
  for (int64_t c = 0; c < layer.ld; ++c) {
    factors[c] = scale && c < width ? scale[c] : static_cast<C>(1);
    shifts[c] = shift && c < width ? shift[c] : static_cast<C>(0);
  }
  if (layer.norm == kBatchNorm) {
    const C* mean = static_cast<const C*>(layer.mean) + number * width;
    const C* variance = static_cast<const C*>(layer.variance) + number * width;
    C* const center = static_cast<C*>(layer.center) + e * layer.ld;
    for (int64_t c = 0; c < layer.ld; ++c) center[c] = c < width ? mean[c] : static_cast<C>(0);
    for (int64_t c = 0; c < width; ++c) {
      factors[c] = static_cast<C>(static_cast<double>(factors[c]) * reciprocal_deviation(variance[c], layer.eps));
    }
  } else {
    const C* variance = static_cast<const C*>(layer.variance) + number * rows;
    C* const rstd = static_cast<C*>(layer.rstd) + e * rows;
    for (int64_t r = 0; r < rows; ++r) rstd[r] = static_cast<C>(reciprocal_deviation(variance[r], layer.eps));
  }
}

// The gradient of the activation's slopes, from all blocks' sums.
template <typename C>
void combine_slopes(const LayerwiseArgs& args, int l, int e) {
  C* const grad = static_cast<C*>(args.layers[l].grad_activation_slopes[e]);
  if (!grad) return;
  each_run(args.level.widths[l + 1], [&](int64_t c, int64_t n) {
    double sum[kRun] = {};
    for (int64_t b = 0; b < args.blocks; ++b) {
      const C* s = partials_of<C>(args, b, e, kSlopeSum) + c;
      for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(s[i]);
    }
    for (int64_t i = 0; i < n; ++i) grad[c + i] = static_cast<C>(sum[i]);
  });
}

// From all blocks' sums of dn and of dn * centred: the gradients of scale and shift, and what makes dz of dn.
template <typename C>
void combine_sums(const LayerwiseArgs& args, int l, int e) {
  const NormLayer& layer = args.layers[l];
  if (layer.activation_slope) combine_slopes<C>(args, l, e);
  if (layer.norm == kNoNorm) return;
  const int64_t width = args.level.widths[l + 1];
  const double count = static_cast<double>(args.level.rows);
  C* const grad_scale = static_cast<C*>(layer.grad_scales[e]);
  C* const grad_shift = static_cast<C*>(layer.grad_shifts[e]);
  const bool batch = layer.norm == kBatchNorm;
  each_run(width, [&](int64_t c, int64_t n) {
    double sum[kRun] = {}, product[kRun] = {};
    for (int64_t b = 0; b < args.blocks; ++b) {
      const C *s = partials_of<C>(args, b, e, 0) + c, *p = partials_of<C>(args, b, e, 1) + c;
      for (int64_t i = 0; i < n; ++i) {
        sum[i] += static_cast<double>(s[i]);
        product[i] += static_cast<double>(p[i]);
      }
    }
    if (batch) {
      const C* variance = static_cast<const C*>(layer.variance) + args.level.numbers[e] * width + c;
      const C* factor = static_cast<const C*>(layer.factor) + e * layer.ld + c;
      C* const slope = static_cast<C*>(layer.grad_slope) + e * layer.ld + c;
      C* const level = static_cast<C*>(layer.grad_offset) + e * layer.ld + c;
      for (int64_t i = 0; i < n; ++i) {
        const double rstd = reciprocal_deviation(variance[i], layer.eps);
        product[i] *= rstd;
        slope[i] = static_cast<C>(-static_cast<double>(factor[i]) * rstd * product[i] / count);
        level[i] = static_cast<C>(-static_cast<double>(factor[i]) * sum[i] / count);
      }
    }
    for (int64_t i = 0; i < n && grad_scale; ++i) grad_scale[c + i] = static_cast<C>(product[i]);
    for (int64_t i = 0; i < n && grad_shift; ++i) grad_shift[c + i] = static_cast<C>(sum[i]);
  });
}

}  // namespace MTLK_ISA
}  // namespace mtlk
