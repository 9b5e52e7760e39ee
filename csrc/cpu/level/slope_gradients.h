// The gradients of the activations with slopes: from that of their outputs, in its place, that of their inputs, and for
// each feature and lane what a group adds to the slope's.
#pragma once

#include <utility>

#include "level/layer_reader.h"

namespace mtlk {
namespace MTLK_ISA {

// Features [o, o + n) of a group.
template <typename T, typename C>
void prelu_gradient(const LayerReader<T>& reader, int64_t o, int64_t n, const C* values, C* grad, C* sums) {
  const Vector<C> zero{}, one = broadcast(static_cast<C>(1));
  for (int64_t i = 0; i < n; ++i) {
    const Vector<C> slope = reader.slope(o + i);
    for (int64_t v = i * kGroup; v < (i + 1) * kGroup; v += Simd<C>::lanes) {
      const Vector<C> x = load(values + v), dy = load(grad + v);
      store(sums + v, load(sums + v) + (x > zero ? zero : x * dy));
      store(grad + v, dy * (x > zero ? one : slope));
    }
  }
}

// All features of the group of rows [row, row + nrows); leaves the gate's mean and rate for who reads the layer again.
// With u what the gate is a sigmoid of, and w its gradient: u has the mean 0 and, but for eps, the length 1, so that of
// w the parts that would change these fall out.
template <typename T, typename C>
void dice_gradient(const LayerReader<T>& reader, int64_t row, int64_t nrows, const C* values, C* grad, C* sums) {
  const int64_t width = reader.width();
  C means[kGroup], rates[kGroup];
  reader.gate(nrows, values, means, rates);
  for (auto [from, to] : {std::pair{means, reader.layer().gate_mean}, {rates, reader.layer().gate_rate}}) {
    std::memcpy(const_cast<C*>(reader.per_row(to)) + row, from, nrows * sizeof(C));
  }
  const Vector<C> one = broadcast(static_cast<C>(1));
  for (int j = 0; j < kGroup; j += Simd<C>::lanes) {
    const Vector<C> mean = load(means + j), rate = load(rates + j);
    // f(slope's gradient, gradient of x with the gate held, u, w)
    const auto parts = [&](int64_t i, auto f) {
      const Vector<C> x = load(values + i * kGroup + j), dy = load(grad + i * kGroup + j), slope = reader.slope(i);
      const Vector<C> u = (x - mean) * rate, p = activate<kSigmoid, C>(u), closed = dy * x * (one - p);
      f(closed, dy * (p + (one - p) * slope), u, (closed - closed * slope) * p);
    };
    Vector<C> sum{}, product{};
    for (int64_t i = 0; i < width; ++i) {
      parts(i, [&](Vector<C> closed, Vector<C>, Vector<C> u, Vector<C> w) {
        C* const total = sums + i * kGroup + j;
        store(total, load(total) + closed);
        sum += w;
        product += w * u;
      });
    }
    sum = sum / static_cast<C>(width);
    for (int64_t i = 0; i < width; ++i) {
      parts(i, [&](Vector<C>, Vector<C> held, Vector<C> u, Vector<C> w) {
        store(grad + i * kGroup + j, held + rate * (w - sum - u * product));
      });
    }
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
