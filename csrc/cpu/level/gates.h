// Gate probabilities of a block of rows, as panels.
#pragma once

#include "gemm/panels.h"
#include "level/level_args.h"
#include "simd/activations.h"

namespace mtlk {
namespace MTLK_ISA {

// Logits [row0, row0 + nrows) of one gate into panel[column][16]; absent rows become zero.
template <typename T, typename C>
void pack_logits(const T* logits, int64_t row_stride, int64_t column_stride, int64_t nrows, int columns, C* panel) {
  if (column_stride == 1) {
    pack_panel(logits, row_stride, nrows, columns, panel);
    return;
  }
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < kGroup; ++r) {
      panel[c * kGroup + r] = r < nrows ? to_compute(logits[r * row_stride + c * column_stride]) : 0;
    }
  }
}

// Softmax over the columns of a panel, in place.
template <typename C>
void softmax_panel(C* panel, int columns) {
  constexpr int L = Simd<C>::lanes;
  for (int lane = 0; lane < kGroup; lane += L) {
    C* p = panel + lane;
    Vector<C> top = load(p);
    for (int c = 1; c < columns; ++c) {
      const Vector<C> v = load(p + c * kGroup);
      top = v > top ? v : (top == top ? top : v);
    }
    Vector<C> sum{};
    for (int c = 0; c < columns; ++c) {
      const Vector<C> e = vexp(load(p + c * kGroup) - top);
      store(p + c * kGroup, e);
      sum += e;
    }
    const Vector<C> scale = static_cast<C>(1) / sum;
    for (int c = 0; c < columns; ++c) store(p + c * kGroup, load(p + c * kGroup) * scale);
  }
}

template <typename C>
void pack_gate(const Gates& gates, int k, int64_t row, int64_t nrows, C* panel) {
  const int64_t rs = gates.row_stride[k], cs = gates.column_stride[k];
  const int columns = gates.sizes[k];
  switch (gates.dtype) {
    case Dtype::kFloat32:
      return pack_logits(static_cast<const float*>(gates.logits[k]) + row * rs, rs, cs, nrows, columns, panel);
    case Dtype::kFloat64:
      if constexpr (sizeof(C) == 8) {
        pack_logits(static_cast<const double*>(gates.logits[k]) + row * rs, rs, cs, nrows, columns, panel);
      }
      return;  // logits are never wider than the experts
    case Dtype::kBFloat16:
      return pack_logits(static_cast<const BFloat16*>(gates.logits[k]) + row * rs, rs, cs, nrows, columns, panel);
    case Dtype::kFloat16:
      return pack_logits(static_cast<const Half*>(gates.logits[k]) + row * rs, rs, cs, nrows, columns, panel);
  }
}

// The probabilities of one group of rows into panel[gates.columns][16].
template <typename C>
void gate_probabilities(const Gates& gates, int64_t row, int64_t nrows, C* panel) {
  for (int k = 0; k < gates.count; ++k) {
    C* place = panel + gates.begin[k] * kGroup;
    pack_gate(gates, k, row, nrows, place);
    softmax_panel(place, gates.sizes[k]);
  }
}

// Rounds a gate's logits to the type in which they are saved, so that the backward pass finds the same probabilities;
// and writes them, if there are rows to write to.
template <typename T, typename C>
void save_logits(C* panel, int columns, T* rows, int64_t ld, int64_t nrows) {
  for (int c = 0; c < columns; ++c) {
    T rounded[kGroup];
    narrow(panel + c * kGroup, rounded, kGroup);
    widen(rounded, panel + c * kGroup, kGroup);
    for (int64_t r = 0; rows && r < nrows; ++r) rows[r * ld + c] = rounded[r];
  }
}

// d logits = p * (inner - sum over the gate's experts of p * inner), for one group of rows.
template <typename T, typename C>
void softmax_gradient(const C* p, const C* inner, int columns, int64_t nrows, T* out) {
  for (int64_t r = 0; r < nrows; ++r) {
    C mean = 0;
    for (int c = 0; c < columns; ++c) mean += p[c * kGroup + r] * inner[c * kGroup + r];
    for (int c = 0; c < columns; ++c) {
      const C value = p[c * kGroup + r] * (inner[c * kGroup + r] - mean);
      from_compute(static_cast<Compute<T>>(value), out + r * columns + c);
    }
  }
}

// Writes rows [row, row + nrows) of gate k's gradient from panels of all columns: probabilities, and inner products of
// the gradient with the experts' outputs.
template <typename C>
void write_logit_gradient(const Gates& gates, int k, const C* probabilities, const C* inner, int64_t row, int64_t nrows,
                          void* out) {
  const int columns = gates.sizes[k];
  const int64_t at = static_cast<int64_t>(gates.begin[k]) * kGroup, to = row * columns;
  const C *p = probabilities + at, *q = inner + at;
  switch (gates.dtype) {
    case Dtype::kFloat32:
      return softmax_gradient(p, q, columns, nrows, static_cast<float*>(out) + to);
    case Dtype::kFloat64:
      return softmax_gradient(p, q, columns, nrows, static_cast<double*>(out) + to);
    case Dtype::kBFloat16:
      return softmax_gradient(p, q, columns, nrows, static_cast<BFloat16*>(out) + to);
    case Dtype::kFloat16:
      return softmax_gradient(p, q, columns, nrows, static_cast<Half*>(out) + to);
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
