// What follows a product: a bias, or batch norm by running statistics, which is a scale and a shift a channel.
#pragma once

#include "level/level_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// Of a run of channels. Scale and shift are of the compute type and stand in the place of a bias.
template <typename T, typename C>
struct Affine {
  const T* bias;
  const C *scale, *shift;

  // Of all channels of a product whose biases, scales and shifts are entry `at` of tables; there may be no scales.
  static Affine of(const void* const* biases, const void* const* scales, const void* const* shifts, int64_t at) {
    if (!scales || !scales[at]) return {static_cast<const T*>(biases[at]), nullptr, nullptr};
    return {nullptr, static_cast<const C*>(scales[at]), static_cast<const C*>(shifts[at])};
  }
  static Affine of(const LevelShape& level, int64_t at) { return of(level.biases, level.scales, level.shifts, at); }

  Affine from(int64_t channel) const {
    if (scale) return {nullptr, scale + channel, shift + channel};
    return {bias ? bias + channel : nullptr, nullptr, nullptr};
  }

  bool nothing() const { return !bias && !scale; }

  MTLK_INLINE Vector<C> operator()(Vector<C> x, int64_t channel) const {
    if (scale) return x * broadcast(scale[channel]) + broadcast(shift[channel]);
    return x + broadcast(bias ? static_cast<C>(to_compute(bias[channel])) : static_cast<C>(0));
  }
  MTLK_INLINE C operator()(C x, int64_t channel) const {
    if (scale) return x * scale[channel] + shift[channel];
    return x + (bias ? static_cast<C>(to_compute(bias[channel])) : static_cast<C>(0));
  }
};

// n values of any storage type, from number `first` on.
template <typename C>
MTLK_INLINE void widen_any(const NormPart& part, int64_t first, int64_t n, C* out) {
  switch (part.dtype) {
    case Dtype::kFloat32:
      return widen(static_cast<const float*>(part.values) + first, out, n);
    case Dtype::kFloat64:
      return widen(static_cast<const double*>(part.values) + first, out, n);
    case Dtype::kBFloat16:
      return widen(static_cast<const BFloat16*>(part.values) + first, out, n);
    case Dtype::kFloat16:
      return widen(static_cast<const Half*>(part.values) + first, out, n);
  }
}

// norm(product + bias) = product * scale + shift for n channels.
template <typename T, typename C>
void fold_norm(const RunningNorm& norm, const void* bias, int64_t n, void* scale, void* shift) {
  constexpr int64_t kRun = 64;
  C mean[kRun], variance[kRun], weight[kRun], offset[kRun], before[kRun];
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t count = n - first < kRun ? n - first : kRun;
    widen_any(norm.mean, first, count, mean);
    widen_any(norm.variance, first, count, variance);
    for (int64_t c = 0; c < count; ++c) weight[c] = 1, offset[c] = before[c] = 0;
    if (norm.weight.values) widen_any(norm.weight, first, count, weight);
    if (norm.bias.values) widen_any(norm.bias, first, count, offset);
    if (bias) widen(static_cast<const T*>(bias) + first, before, count);
    C* const scales = static_cast<C*>(scale) + first;
    C* const shifts = static_cast<C*>(shift) + first;
    const C eps = static_cast<C>(norm.eps);
    for (int64_t c = 0; c < count; ++c) scales[c] = weight[c] / std::sqrt(variance[c] + eps);
    for (int64_t c = 0; c < count; ++c) shifts[c] = (before[c] - mean[c]) * scales[c] + offset[c];
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
