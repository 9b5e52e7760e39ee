// SNR-Aver for a run of rows: every input is read once, while it is in the first-level cache for all outputs.
#pragma once

#include "gemm/panels.h"
#include "snr/snr_args.h"

namespace mtlk {
namespace MTLK_ISA {

// Rows of several tensors as the compute type: where they are, or widened.
template <typename T>
class SnrRows {
 public:
  using C = Compute<T>;

  static int64_t bytes(int count, int64_t features) {
    return Arena::bytes<const C*>(count) + Arena::bytes<bool>(count) +
           (__is_same(T, C) ? 0 : count * Arena::bytes<C>(features));
  }
  SnrRows(int count, int64_t features, Arena& arena) : count_(count), features_(features) {
    rows_ = arena.take<const C*>(count);
    used_ = arena.take<bool>(count);
    for (int i = 0; i < count; ++i) {
      used_[i] = false;
      if constexpr (!__is_same(T, C)) rows_[i] = arena.take<C>(features);
    }
  }
  void use(int i) { used_[i] = true; }
  void load(const void* const* tensors, const int64_t* ld, int64_t row) {
    for (int i = 0; i < count_; ++i) {
      if (!used_[i]) continue;
      const T* from = static_cast<const T*>(tensors[i]) + row * ld[i];
      if constexpr (__is_same(T, C)) {
        rows_[i] = from;
      } else {
        widen(from, const_cast<C*>(rows_[i]), features_);
      }
    }
  }
  const C* operator[](int i) const { return rows_[i]; }

 private:
  const int count_;
  const int64_t features_;
  const C** rows_;
  bool* used_;
};

// out[f] = the sum of a row's routes, for V vectors of features from f on.
template <typename T, int V>
MTLK_INLINE void snr_aver_vectors(const SnrRoute* begin, const SnrRoute* end, const SnrRows<T>& rows, int64_t f,
                                  T* out) {
  using C = Compute<T>;
  constexpr int L = Simd<C>::lanes;
  Vector<C> sum[V] = {};
  for (const SnrRoute* r = begin; r < end; ++r) {
    const Vector<C> z = broadcast(static_cast<C>(r->z));
    const C* x = rows[r->input] + f;
    for (int k = 0; k < V; ++k) sum[k] += z * load(x + k * L);
  }
  alignas(64) C values[V * L];
  for (int k = 0; k < V; ++k) store(values + k * L, sum[k]);
  narrow(values, out + f, V * L);
}

template <typename T>
void snr_aver_sum(const SnrSum& call, int64_t first, int64_t last, void* memory) {
  using C = Compute<T>;
  constexpr int L = Simd<C>::lanes;
  const int64_t features = call.input_widths[0];
  Arena arena(memory);
  SnrRows<T> rows(call.inputs, features, arena);
  for (int r = 0; r < call.route_begin[call.outputs]; ++r) rows.use(call.routes[r].input);
  for (int64_t row = first; row < last; ++row) {
    rows.load(call.in, call.in_ld, row);
    for (int i = 0; i < call.outputs; ++i) {
      const SnrRoute *begin = call.routes + call.route_begin[i], *end = call.routes + call.route_begin[i + 1];
      T* out = static_cast<T*>(call.out[i]) + row * features;
      int64_t f = 0;
      for (; f + 4 * L <= features; f += 4 * L) snr_aver_vectors<T, 4>(begin, end, rows, f, out);
      for (; f + L <= features; f += L) snr_aver_vectors<T, 1>(begin, end, rows, f, out);
      for (; f < features; ++f) {
        C sum = 0;
        for (const SnrRoute* r = begin; r < end; ++r) sum += static_cast<C>(r->z) * rows[r->input][f];
        from_compute(sum, out + f);
      }
    }
  }
}

// results[p] = <dv_i, u_j> over the rows, for each pair; in the compute type within a run of rows.
template <typename T>
void snr_aver_dots(const SnrDots& call, int64_t first, int64_t last, double* results, void* memory) {
  using C = Compute<T>;
  constexpr int L = Simd<C>::lanes;
  Arena arena(memory);
  SnrRows<T> u(call.inputs, call.features, arena), grads(call.outputs, call.features, arena);
  C* lanes = arena.take<C>(call.count * L);
  std::memset(lanes, 0, call.count * L * sizeof(C));
  for (int64_t p = 0; p < call.count; ++p) {
    results[p] = 0;
    u.use(call.pairs[p].input);
    grads.use(call.pairs[p].output);
  }
  for (int64_t row = first; row < last; ++row) {
    u.load(call.u, call.u_ld, row);
    grads.load(call.grad_outputs, call.grad_output_ld, row);
    for (int64_t p = 0; p < call.count; ++p) {
      const C *a = grads[call.pairs[p].output], *b = u[call.pairs[p].input];
      Vector<C> even = load(lanes + p * L), odd{};
      int64_t f = 0;
      for (; f + 2 * L <= call.features; f += 2 * L) {
        even += load(a + f) * load(b + f);
        odd += load(a + f + L) * load(b + f + L);
      }
      for (; f + L <= call.features; f += L) even += load(a + f) * load(b + f);
      C rest = 0;
      for (; f < call.features; ++f) rest += a[f] * b[f];
      even += odd;
      store(lanes + p * L, even);
      results[p] += static_cast<double>(rest);
    }
  }
  for (int64_t p = 0; p < call.count; ++p) {
    for (int i = 0; i < L; ++i) results[p] += static_cast<double>(lanes[p * L + i]);
  }
}

template <typename T>
SnrAverKernels snr_aver_kernels() {
  return {[](const SnrSum& call) { return SnrRows<T>::bytes(call.inputs, call.input_widths[0]); }, snr_aver_sum<T>,
          [](const SnrDots& call) {
            return SnrRows<T>::bytes(call.inputs, call.features) + SnrRows<T>::bytes(call.outputs, call.features) +
                   Arena::bytes<Compute<T>>(call.count * Simd<Compute<T>>::lanes);
          },
          snr_aver_dots<T>};
}

}  // namespace MTLK_ISA
}  // namespace mtlk
