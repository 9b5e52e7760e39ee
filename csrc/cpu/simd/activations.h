// The activations of expert layers.
#pragma once

#include "simd/activation_codes.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

constexpr double kLeakySlope = 0.01;

// exp, erf and tanh for float vectors: polynomials fitted at Chebyshev nodes, with errors below 4e-9 before rounding.
// For double they are the C library's, lane by lane.
template <typename V, typename F>
MTLK_INLINE V lanewise(V x, F f) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(x[0])); ++i) x[i] = f(x[i]);
  return x;
}

typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
using FloatVector = Vector<float>;

MTLK_INLINE FloatVector vabs(FloatVector x) { return (FloatVector)((IntVector)x & 0x7fffffff); }

MTLK_INLINE FloatVector vexp(FloatVector x) {
  const FloatVector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  // Clamped by selects that let NaN through, where the result is infinite or less than half of the least subnormal
  // number.
  FloatVector y = x > 88.8f ? broadcast(88.8f) : x;
  y = y < -104.0f ? broadcast(-104.0f) : y;
  const FloatVector shifted = y * 1.44269504088896341f + magic;
  const FloatVector n = shifted - magic;
  const FloatVector r = (y - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  FloatVector p = broadcast(1.3941110391161742e-3f);
  p = p * r + 8.375127947255121e-3f;
  p = p * r + 4.166635287315116e-2f;
  p = p * r + 0.16666415496048143f;
  p = p * r + 0.5000000047123155f;
  p = p * r + 1.0000000377204035f;
  p = p * r + 1.0f;
  // 2^n in two halves, so that neither leaves the range of normal numbers.
  const IntVector whole = (IntVector)shifted - (IntVector)magic;
  const IntVector half = whole >> 1;
  const FloatVector low = (FloatVector)((half + 127) << 23);
  const FloatVector high = (FloatVector)((whole - half + 127) << 23);
  const FloatVector result = p * low * high;
  return x < -104.0f ? FloatVector{} : (x > 88.8f ? broadcast(INFINITY) : result);
}

MTLK_INLINE FloatVector verf(FloatVector x) {
  const FloatVector s = x * x;
  FloatVector p = broadcast(7.875875095560818e-5f);
  p = p * s - 8.016864297413305e-4f;
  p = p * s + 5.189087424650195e-3f;
  p = p * s - 2.685421201130779e-2f;
  p = p * s + 0.11283594715178118f;
  p = p * s - 0.3761262666672214f;
  p = p * s + 1.1283791658483513f;
  // Beyond 1: 1 - exp(-x^2) q(1 / (1 + 0.45 |x|)).
  const FloatVector a = vabs(x);
  const FloatVector t = 1.0f / (0.45f * a + 1.0f);
  FloatVector q = broadcast(9.322908917890171e-2f);
  q = q * t - 0.33638511258186243f;
  q = q * t + 0.35550660503077436f;
  q = q * t - 8.127155336295638e-2f;
  q = q * t + 0.24808515539346482f;
  q = q * t + 0.2106601534365434f;
  q = q * t + 0.2565971509650879f;
  q = q * t + 0.2536450221501271f;
  q = q * t + 9.278538771473333e-6f;
  FloatVector tail = 1.0f - vexp(-s) * q;
  tail = x < 0.0f ? -tail : tail;
  return a < 1.0f ? x * p : tail;
}

MTLK_INLINE FloatVector vtanh(FloatVector x) {
  const FloatVector s = x * x;
  FloatVector p = broadcast(-5.599785033890001e-3f);
  p = p * s + 2.05369719923097e-2f;
  p = p * s - 5.37042774358477e-2f;
  p = p * s + 0.13330917169356413f;
  p = p * s - 0.3333325144730861f;
  p = p * s;
  const FloatVector a = vabs(x);
  const FloatVector e = vexp(a * -2.0f);
  FloatVector tail = (1.0f - e) / (1.0f + e);
  tail = x < 0.0f ? -tail : tail;
  return a < 0.6f ? x + x * p : tail;
}

using DoubleVector = Vector<double>;
MTLK_INLINE DoubleVector vexp(DoubleVector x) {
  return lanewise(x, [](double v) { return std::exp(v); });
}
MTLK_INLINE DoubleVector verf(DoubleVector x) {
  return lanewise(x, [](double v) { return std::erf(v); });
}
MTLK_INLINE DoubleVector vtanh(DoubleVector x) {
  return lanewise(x, [](double v) { return std::tanh(v); });
}

// x < 0 ? 0 : x, so that a NaN stays: of two operands that do not compare the instruction gives the second.
template <typename C>
MTLK_INLINE Vector<C> not_below_zero(Vector<C> x) {
  const Vector<C> zero{};
  if constexpr (sizeof(C) == 4) {
#if defined(__AVX512F__)
    return (Vector<C>)_mm512_max_ps((__m512)zero, (__m512)x);
#elif defined(__AVX2__)
    return (Vector<C>)_mm256_max_ps((__m256)zero, (__m256)x);
#endif
  }
  return x < zero ? zero : x;
}

template <int Code, typename C>
MTLK_INLINE Vector<C> activate(Vector<C> x) {
  if constexpr (Code == kRelu) return not_below_zero<C>(x);
  if constexpr (Code == kLeakyRelu) return x > Vector<C>{} ? x : x * static_cast<C>(kLeakySlope);
  if constexpr (Code == kGelu) {
    return x * static_cast<C>(0.5) * (static_cast<C>(1) + verf(x * static_cast<C>(0.70710678118654752440)));
  }
  if constexpr (Code == kSilu) return x / (static_cast<C>(1) + vexp(-x));
  if constexpr (Code == kTanh) return vtanh(x);
  if constexpr (Code == kSigmoid) return static_cast<C>(1) / (static_cast<C>(1) + vexp(-x));
  return x;
}

// The same, and those with a slope. Dice's gate is a sigmoid of (x - mean) * rate, which are of the row of x.
template <int Code, typename C>
MTLK_INLINE Vector<C> activate_with_slope(Vector<C> x, Vector<C> slope, Vector<C> mean, Vector<C> rate) {
  if constexpr (Code == kPrelu) return x > Vector<C>{} ? x : x * slope;
  if constexpr (Code == kDice) {
    const Vector<C> gate = activate<kSigmoid, C>((x - mean) * rate);
    return x * (gate + (static_cast<C>(1) - gate) * slope);
  }
  return activate<Code, C>(x);
}

// Of the smooth activations, from their input where from_input says so, otherwise from their output.
template <int Code, typename C>
MTLK_INLINE Vector<C> derivative(Vector<C> s) {
  const Vector<C> one = broadcast(static_cast<C>(1));
  if constexpr (Code == kGelu) {
    const Vector<C> cdf = static_cast<C>(0.5) * (one + verf(s * static_cast<C>(0.70710678118654752440)));
    return cdf + s * vexp(s * s * static_cast<C>(-0.5)) * static_cast<C>(0.39894228040143267794);
  }
  if constexpr (Code == kSilu) {
    const Vector<C> sigmoid = one / (one + vexp(-s));
    return sigmoid * (one + s * (one - sigmoid));
  }
  if constexpr (Code == kTanh) return one - s * s;
  return s * (one - s);
}

// The gradient of the activation's input from that of its output; s as for its derivative. What is not finite goes the
// way that it goes in PyTorch: relu chooses, so that nothing of the gradient comes through where the unit is off, and
// all of it where s is NaN; the others multiply.
template <int Code, typename C>
MTLK_INLINE Vector<C> activation_gradient(Vector<C> grad, Vector<C> s) {
  const Vector<C> zero{};
  if constexpr (Code == kNone) return grad;
  if constexpr (Code == kRelu) return s <= zero ? zero : grad;
  if constexpr (Code == kLeakyRelu) return s > zero ? grad : grad * static_cast<C>(kLeakySlope);
  return grad * derivative<Code, C>(s);
}

template <int Code>
struct CodeConstant {
  static constexpr int value = Code;
};

// f(the code as a compile-time constant) if it is one of these, otherwise f(that of none).
template <int... Codes, typename F>
MTLK_INLINE void with_code_of(int code, F f) {
  if (!((code == Codes && (f(CodeConstant<Codes>{}), true)) || ...)) f(CodeConstant<kNone>{});
}

template <typename F>
MTLK_INLINE void with_activation(int code, F f) {
  with_code_of<kRelu, kLeakyRelu, kGelu, kSilu, kTanh, kSigmoid>(code, f);
}

// The same, and for those with slopes.
template <typename F>
MTLK_INLINE void with_any_activation(int code, F f) {
  with_code_of<kRelu, kLeakyRelu, kGelu, kSilu, kTanh, kSigmoid, kPrelu, kDice>(code, f);
}

}  // namespace MTLK_ISA
}  // namespace mtlk
