// SNR-Aver for a run of rows: a few vectors of every input are in the first-level cache, or in registers, for all
// outputs.
#pragma once

#include "gemm/panels.h"
#include "snr/snr_args.h"

namespace mtlk {
namespace MTLK_ISA {

// Outputs that sum the same inputs, and pairs of inputs and outputs, go together up to so many; and as many vectors of
// an output, or half of them where there are too few registers for all sums.
constexpr int kTogether = 4, kAverVectors = 4;

// Rows that are summed and then multiplied with each other: one by one a step in float32 took up to 10% longer.
constexpr int64_t kRowsTogether = 4;

// Of several tensors with unit column stride, a row.
template <typename T>
class SnrRows {
 public:
  SnrRows(int count, Arena& arena) : count_(count), rows_(arena.take<const T*>(count)) {}
  static int64_t bytes(int count) { return Arena::bytes<const T*>(count); }

  void at(const void* const* tensors, const int64_t* ld, int64_t row) {
    for (int i = 0; i < count_; ++i) rows_[i] = static_cast<const T*>(tensors[i]) + row * ld[i];
  }
  const T* operator[](int i) const { return rows_[i]; }

 private:
  const int count_;
  const T** rows_;
};

template <typename T>
class SnrAverSum {
 public:
  using C = Compute<T>;
  static constexpr int L = Simd<C>::lanes;

  static int64_t bytes(const SnrSum& call) {
    return SnrRows<T>::bytes(call.inputs) + Arena::bytes<int>(call.outputs) +
           Arena::bytes<C>(call.route_begin[call.outputs]);
  }

  SnrAverSum(const SnrSum& call, bool past, void* memory) : SnrAverSum(call, past, Arena(memory)) {}

  void run(int64_t row) {
    const int64_t features = call_.input_widths[0];
    rows_.at(call_.in, call_.in_ld, row);
    row_ = row * features;
    int64_t f = 0;
    for (; f + kAverVectors * L <= features; f += kAverVectors * L) outputs<kAverVectors>(f);
    for (; f + L <= features; f += L) outputs<1>(f);
    for (; f < features; ++f) {
      for (int i = 0; i < call_.outputs; ++i) {
        C sum = 0;
        for (int r = call_.route_begin[i]; r < call_.route_begin[i + 1]; ++r) {
          sum += z_[r] * static_cast<C>(to_compute(rows_[call_.routes[r].input][f]));
        }
        from_compute(sum, out(i) + f);
      }
    }
  }

  void finish() const {
    if (past_) fence_past_caches();
  }

 private:
  SnrAverSum(const SnrSum& call, bool past, Arena arena)
      : call_(call),
        rows_(call.inputs, arena),
        together_(arena.take<int>(call.outputs)),
        z_(arena.take<C>(call.route_begin[call.outputs])),
        past_(past) {
    for (int i = 0; i < call.outputs; ++i) {
      past_ = past_ && can_go_past_caches(static_cast<const T*>(call.out[i]), call.input_widths[0]);
    }
    for (int r = 0; r < call.route_begin[call.outputs]; ++r) z_[r] = static_cast<C>(call.routes[r].z);
    for (int i = 0; i < call.outputs; i += together_[i]) {
      together_[i] = 1;
      while (together_[i] < kTogether && i + together_[i] < call.outputs && alike(i, i + together_[i])) ++together_[i];
    }
  }

  int count(int output) const { return call_.route_begin[output + 1] - call_.route_begin[output]; }
  bool alike(int a, int b) const {
    bool same = count(a) == count(b);
    for (int r = 0; same && r < count(a); ++r) {
      same = call_.routes[call_.route_begin[a] + r].input == call_.routes[call_.route_begin[b] + r].input;
    }
    return same;
  }
  T* out(int output) const { return static_cast<T*>(call_.out[output]) + row_; }

  // V vectors of all outputs, from feature f on.
  template <int V>
  MTLK_INLINE void outputs(int64_t f) const {
    static_assert(kTogether == 4);
    for (int i = 0; i < call_.outputs; i += together_[i]) {
      if (together_[i] == 4) {
        fitting<4, V>(i, f);
      } else if (together_[i] == 3) {
        fitting<3, V>(i, f);
      } else if (together_[i] == 2) {
        fitting<2, V>(i, f);
      } else {
        fitting<1, V>(i, f);
      }
    }
  }

  // Of O outputs, from output `first` on, that sum the same inputs; in halves where sums do not fit into registers.
  template <int O, int V>
  MTLK_INLINE void fitting(int first, int64_t f) const {
    if constexpr (V > 1 && (O + 1) * V >= kRegisters) {
      fitting<O, V / 2>(first, f);
      fitting<O, V / 2>(first, f + V / 2 * L);
    } else {
      vectors<O, V>(first, f);
    }
  }

  template <int O, int V>
  MTLK_INLINE void vectors(int first, int64_t f) const {
    const SnrRoute* const routes = call_.routes + call_.route_begin[first];
    const int routes_each = count(first);
    const C* z[O];
    for (int o = 0; o < O; ++o) z[o] = z_ + call_.route_begin[first + o];
    Vector<C> sum[O][V];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) sum[o][k] = Vector<C>{};
    }
    for (int r = 0; r < routes_each; ++r) {
      const T* const x = rows_[routes[r].input] + f;
      Vector<C> values[V];
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) values[k] = load_as<T, C>(x + k * L);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) {
        const Vector<C> factor = broadcast(z[o][r]);
#pragma GCC unroll 4
        for (int k = 0; k < V; ++k) sum[o][k] = multiply_add<C>(factor, values[k], sum[o][k]);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      alignas(64) C values[V * L];
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) store(values + k * L, sum[o][k]);
      if (past_ && (V * L) % kPerVector<T> == 0) {
        narrow_past_caches(values, out(first + o) + f, V * L);
      } else {
        narrow(values, out(first + o) + f, V * L);
      }
    }
  }

  const SnrSum& call_;
  SnrRows<T> rows_;
  int* const together_;  // of an output that is the first of some
  C* const z_;           // of each route
  bool past_;
  int64_t row_ = 0;  // where its elements are in outputs
};

// results[p] = <dv_i, u_j> over the rows, for each pair; in the compute type within a run of rows.
template <typename T>
class SnrAverDots {
 public:
  using C = Compute<T>;
  static constexpr int L = Simd<C>::lanes;

  static int64_t bytes(const SnrDots& call) {
    return SnrRows<T>::bytes(call.inputs) + SnrRows<T>::bytes(call.outputs) + Arena::bytes<C>(call.count * L) +
           Arena::bytes<int64_t>(static_cast<int64_t>(call.inputs) * call.outputs);
  }

  SnrAverDots(const SnrDots& call, double* results, void* memory) : SnrAverDots(call, results, Arena(memory)) {}

  void run(int64_t row) {
    u_.at(call_.u, call_.u_ld, row);
    grads_.at(call_.grad_outputs, call_.grad_output_ld, row);
    for (int i = 0; i < call_.outputs; i += kTogether) {
      for (int j = 0; j < call_.inputs; j += kTogether) block(i, j);
    }
  }

  void finish() const {
    for (int64_t p = 0; p < call_.count; ++p) {
      for (int lane = 0; lane < L; ++lane) results_[p] += static_cast<double>(lanes_[p * L + lane]);
    }
  }

 private:
  SnrAverDots(const SnrDots& call, double* results, Arena arena)
      : call_(call),
        results_(results),
        u_(call.inputs, arena),
        grads_(call.outputs, arena),
        lanes_(arena.take<C>(call.count * L)),
        number_(arena.take<int64_t>(static_cast<int64_t>(call.inputs) * call.outputs)) {
    std::memset(lanes_, 0, call.count * L * sizeof(C));
    for (int i = 0; i < call.outputs * call.inputs; ++i) number_[i] = -1;
    for (int64_t p = 0; p < call.count; ++p) {
      results_[p] = 0;
      number_[call.pairs[p].output * call.inputs + call.pairs[p].input] = p;
    }
  }

  // The pairs of up to kTogether outputs and inputs. All at once, those that nobody wants too, where it is not few.
  void block(int i, int j) {
    constexpr int kFew = 4;
    const int outputs = call_.outputs - i < kTogether ? call_.outputs - i : kTogether;
    const int inputs = call_.inputs - j < kTogether ? call_.inputs - j : kTogether;
    int wanted = 0;
    for (int o = 0; o < outputs; ++o) {
      for (int k = 0; k < inputs; ++k) wanted += number(i + o, j + k) >= 0;
    }
    if (wanted > kFew && outputs == kTogether && inputs == kTogether) return products<kTogether>(i, j);
    for (int o = 0; o < outputs; ++o) {
      for (int k = 0; k < inputs; ++k) {
        if (number(i + o, j + k) >= 0) products<1>(i + o, j + k);
      }
    }
  }

  // Of N outputs and N inputs.
  template <int N>
  MTLK_INLINE void products(int i, int j) {
    Vector<C> sum[N][N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int m = 0; m < N; ++m) sum[n][m] = Vector<C>{};
    }
    int64_t f = 0;
    for (; f + L <= call_.features; f += L) {
      Vector<C> a[N], b[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) a[n] = load_as<T, C>(grads_[i + n] + f), b[n] = load_as<T, C>(u_[j + n] + f);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
        for (int m = 0; m < N; ++m) sum[n][m] += a[n] * b[m];
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int m = 0; m < N; ++m) {
        const int64_t p = number(i + n, j + m);
        if (p < 0) continue;
        store(lanes_ + p * L, load(lanes_ + p * L) + sum[n][m]);
        C rest = 0;
        for (int64_t k = f; k < call_.features; ++k) {
          rest += static_cast<C>(to_compute(grads_[i + n][k])) * static_cast<C>(to_compute(u_[j + m][k]));
        }
        results_[p] += static_cast<double>(rest);
      }
    }
  }

  int64_t number(int output, int input) const { return number_[output * call_.inputs + input]; }

  const SnrDots& call_;
  double* const results_;
  SnrRows<T> u_, grads_;
  C* const lanes_;         // of each pair
  int64_t* const number_;  // of the pair of an output and an input, or -1
};

template <typename T>
SnrAverKernels snr_aver_kernels() {
  const auto bytes = [](const SnrAverWork& work) {
    return (work.sum ? SnrAverSum<T>::bytes(*work.sum) : 0) + (work.dots ? SnrAverDots<T>::bytes(*work.dots) : 0);
  };
  const auto run = [](const SnrAverWork& work, int64_t first, int64_t last, double* results, void* memory) {
    const auto some_rows = [](auto& part, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) part.run(row);
    };
    const auto each_row = [=](auto&... parts) {
      for (int64_t row = first; row < last; row += kRowsTogether) {
        (some_rows(parts, row, row + kRowsTogether < last ? row + kRowsTogether : last), ...);
      }
      (parts.finish(), ...);
    };
    if (!work.sum) {
      SnrAverDots<T> dots(*work.dots, results, memory);
      return each_row(dots);
    }
    SnrAverSum<T> sum(*work.sum, work.past, memory);
    if (!work.dots) return each_row(sum);
    SnrAverDots<T> dots(*work.dots, results, static_cast<char*>(memory) + SnrAverSum<T>::bytes(*work.sum));
    each_row(sum, dots);
  };
  return {bytes, run};
}

}  // namespace MTLK_ISA
}  // namespace mtlk
