// Products of a few rows, which lie beside each other, with weights that are read once, as they are.
#pragma once

#include "gemm/engine.h"
#include "gemm/panels.h"
#include "simd/subnormals.h"

namespace mtlk {
namespace MTLK_ISA {

// out[i] = the sum of the lanes of partial[i], for 16 vectors.
template <typename C>
MTLK_INLINE void sum_lanes(const C* partial, C* out) {
  constexpr int L = Simd<C>::lanes;
  for (int i = 0; i < kGroup; ++i) {
    C sum = 0;
    for (int lane = 0; lane < L; ++lane) sum += partial[i * L + lane];
    out[i] = sum;
  }
}

// Each step adds halves of vectors, and leaves half as many of them.
#if defined(__AVX512F__)
template <>
MTLK_INLINE void sum_lanes(const float* partial, float* out) {
  __m512 v[kGroup];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_ps(partial + i * 16);
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44) + _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0xee);
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd);
  }
  v[0] = _mm512_shuffle_f32x4(v[0], v[1], 0x88) + _mm512_shuffle_f32x4(v[0], v[1], 0xdd);
  _mm512_storeu_ps(out, v[0]);
}
#elif defined(__AVX2__)
template <>
MTLK_INLINE void sum_lanes(const float* partial, float* out) {
  for (int half = 0; half < kGroup; half += 8) {
    __m256 v[8];
    for (int i = 0; i < 8; ++i) v[i] = _mm256_load_ps(partial + (half + i) * 8);
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      v[i] = _mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44) + _mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0xee);
    }
    v[0] = _mm256_permute2f128_ps(v[0], v[1], 0x20) + _mm256_permute2f128_ps(v[0], v[1], 0x31);
    _mm256_storeu_ps(out + half, v[0]);
  }
}
#endif

// Outputs of a tile of R rows, two and more: as many as have their sums in registers.
template <int R>
constexpr int tile_outputs() {
  if (kRegisters < 32) return R <= 4 ? 2 : 1;
  return R <= 2 ? 8 : R <= 4 ? 4 : 2;
}

// partial[r][o] = the lanes of <x row r, w row o> over whole vectors of `depth`, for R rows and O outputs.
template <typename T, typename C, int R, int O>
MTLK_INLINE void dot_tile(const T* w, int64_t ldw, const C* x, int64_t ldx, int64_t depth, C* partial) {
  constexpr int L = Simd<C>::lanes;
  Vector<C> acc[O][R] = {};
  for (int64_t k = 0; k + L <= depth; k += L) {
    Vector<C> row[R];
    for (int r = 0; r < R; ++r) row[r] = load(x + r * ldx + k);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      Vector<C> weight = load_as<T, C>(w + o * ldw + k);
      keep_in_register(weight);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[o][r] += weight * row[r];
    }
  }
  for (int o = 0; o < O; ++o) {
    for (int r = 0; r < R; ++r) store(partial + (r * kGroup + o) * L, acc[o][r]);
  }
}

// The same of one row and one output: weights are read in the order in which they lie. Several at a time, as rows that
// share what was loaded want it, took on a Zen 4 2 to 7% longer in float32, in a program around the loop, and 8% in
// bfloat16 for a level.
template <typename T, typename C>
MTLK_INLINE void dot_row(const T* w, const C* x, int64_t depth, C* partial) {
  constexpr int L = Simd<C>::lanes, S = 4;
  Vector<C> acc[S] = {};
  int64_t k = 0;
  for (; k + S * L <= depth; k += S * L) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) acc[s] += load_as<T, C>(w + k + s * L) * load(x + k + s * L);
  }
  for (; k + L <= depth; k += L) acc[0] += load_as<T, C>(w + k) * load(x + k);
  store(partial, (acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// out[r * ld_out + o] = <x row r, w row o>; out is written in whole groups of 16 outputs.
template <typename T, typename C, int R>
void dot_rows(const T* w, int64_t ldw, int64_t outputs, const C* x, int64_t ldx, int64_t depth, C* out,
              int64_t ld_out) {
  constexpr int L = Simd<C>::lanes;
  alignas(64) C partial[R * kGroup * L];
  const int64_t tail = depth / L * L;
  for (int64_t o = 0; o < outputs; o += kGroup) {
    const int n = static_cast<int>(outputs - o < kGroup ? outputs - o : kGroup);
    const T* rows = w + o * ldw;
    if constexpr (R == 1) {
      for (int i = 0; i < n; ++i) dot_row<T, C>(rows + i * ldw, x, depth, partial + i * L);
    } else {
      constexpr int O = tile_outputs<R>();
      int i = 0;
      for (; i + O <= n; i += O) dot_tile<T, C, R, O>(rows + i * ldw, ldw, x, ldx, depth, partial + i * L);
      for (; i < n; ++i) dot_tile<T, C, R, 1>(rows + i * ldw, ldw, x, ldx, depth, partial + i * L);
    }
    for (int r = 0; r < R; ++r) {
      C* place = out + r * ld_out + o;
      if (n < kGroup) std::memset(partial + (r * kGroup + n) * L, 0, (kGroup - n) * L * sizeof(C));
      sum_lanes(partial + r * kGroup * L, place);
      for (int64_t k = tail; k < depth; ++k) {
        for (int j = 0; j < n; ++j) place[j] += static_cast<C>(to_compute(rows[j * ldw + k])) * x[r * ldx + k];
      }
    }
  }
}

#if defined(__AVX512BF16__)
// As dot_tile and dot_rows of rows that are bfloat16 as well: weights need not be widened. Behind each row's depth are
// zeros up to a multiple of kDotStep.
constexpr int64_t kDotStep = 32;

template <int R, int O>
MTLK_INLINE void dot_tile(const BFloat16* w, int64_t ldw, const BFloat16* x, int64_t ldx, int64_t depth,
                          float* partial) {
  __m512 acc[O][R] = {};
  for (int64_t k = 0; k < depth; k += kDotStep) {
    const __mmask32 inside = depth - k < kDotStep ? (__mmask32{1} << (depth - k)) - 1 : ~__mmask32{0};
    __m512bh row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = (__m512bh)_mm512_loadu_si512(x + r * ldx + k);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const auto weight = (__m512bh)_mm512_maskz_loadu_epi16(inside, w + o * ldw + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[o][r] = _mm512_dpbf16_ps(acc[o][r], weight, row[r]);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) _mm512_store_ps(partial + (r * kGroup + o) * kGroup, acc[o][r]);
  }
}

// As dot_row of rows in bfloat16.
MTLK_INLINE void dot_row(const BFloat16* w, const BFloat16* x, int64_t depth, float* partial) {
  constexpr int S = 4;
  __m512 acc[S] = {};
  int64_t k = 0;
  for (; k + S * kDotStep <= depth; k += S * kDotStep) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const auto weight = (__m512bh)_mm512_loadu_si512(w + k + s * kDotStep);
      acc[s] = _mm512_dpbf16_ps(acc[s], weight, (__m512bh)_mm512_loadu_si512(x + k + s * kDotStep));
    }
  }
  for (; k < depth; k += kDotStep) {
    const __mmask32 inside = depth - k < kDotStep ? (__mmask32{1} << (depth - k)) - 1 : ~__mmask32{0};
    const auto weight = (__m512bh)_mm512_maskz_loadu_epi16(inside, w + k);
    acc[0] = _mm512_dpbf16_ps(acc[0], weight, (__m512bh)_mm512_loadu_si512(x + k));
  }
  _mm512_store_ps(partial, (acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <int R>
void dot_rows(const BFloat16* w, int64_t ldw, int64_t outputs, const BFloat16* x, int64_t ldx, int64_t depth,
              float* out, int64_t ld_out) {
  alignas(64) float partial[R * kGroup * kGroup];
  for (int64_t o = 0; o < outputs; o += kGroup) {
    const int n = static_cast<int>(outputs - o < kGroup ? outputs - o : kGroup);
    const BFloat16* const rows = w + o * ldw;
    if constexpr (R == 1) {
      for (int i = 0; i < n; ++i) dot_row(rows + i * ldw, x, depth, partial + i * kGroup);
    } else {
      constexpr int O = tile_outputs<R>();
      int i = 0;
      for (; i + O <= n; i += O) dot_tile<R, O>(rows + i * ldw, ldw, x, ldx, depth, partial + i * kGroup);
      for (; i < n; ++i) dot_tile<R, 1>(rows + i * ldw, ldw, x, ldx, depth, partial + i * kGroup);
    }
    for (int r = 0; r < R; ++r) {
      float* const own = partial + r * kGroup * kGroup;
      if (n < kGroup) std::memset(own + n * kGroup, 0, (kGroup - n) * kGroup * sizeof(float));
      sum_lanes(own, out + r * ld_out + o);
    }
  }
}
#endif

// acc row r += the sum over O rows of w of factor[r][o] * w row o, over whole vectors of `width`.
template <typename T, typename C, int R, int O>
MTLK_INLINE void add_rows_tile(const T* w, int64_t ldw, const C* factor, int64_t ld_factor, int64_t width, C* acc,
                               int64_t ld_acc) {
  constexpr int L = Simd<C>::lanes;
  Vector<C> f[O][R];
  for (int o = 0; o < O; ++o) {
    for (int r = 0; r < R; ++r) f[o][r] = broadcast(factor[r * ld_factor + o]);
  }
  for (int64_t i = 0; i + L <= width; i += L) {
    Vector<C> sum[R];
    for (int r = 0; r < R; ++r) sum[r] = load(acc + r * ld_acc + i);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      Vector<C> weight = load_as<T, C>(w + o * ldw + i);
      keep_in_register(weight);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] += f[o][r] * weight;
    }
    for (int r = 0; r < R; ++r) store(acc + r * ld_acc + i, sum[r]);
  }
  for (int64_t i = width / L * L; i < width; ++i) {
    for (int r = 0; r < R; ++r) {
      for (int o = 0; o < O; ++o) {
        acc[r * ld_acc + i] += factor[r * ld_factor + o] * static_cast<C>(to_compute(w[o * ldw + i]));
      }
    }
  }
}

// acc row r += the sum over all rows of w.
template <typename T, typename C, int R>
void add_rows(const T* w, int64_t ldw, int64_t outputs, const C* factor, int64_t ld_factor, int64_t width, C* acc,
              int64_t ld_acc) {
  constexpr int O = R == 1 ? 8 : R <= 4 ? kRegisters / 8 : kRegisters / 16;
  int64_t o = 0;
  for (; o + O <= outputs; o += O) {
    add_rows_tile<T, C, R, O>(w + o * ldw, ldw, factor + o, ld_factor, width, acc, ld_acc);
  }
  for (; o < outputs; ++o) {
    add_rows_tile<T, C, R, 1>(w + o * ldw, ldw, factor + o, ld_factor, width, acc, ld_acc);
  }
}

template <int N>
struct RowsConstant {
  static constexpr int value = N;
};

// Of so many rows those that are computed: some that are not there are too, from what lies in their place.
inline int64_t computed_rows(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kFewRows; }

// Zeroes that place: what an earlier call left there may be subnormal, and slow where that is not zero in products.
template <typename C>
void clear_absent_rows(C* rows, int64_t ld, int64_t nrows) {
  std::memset(rows + nrows * ld, 0, (computed_rows(nrows) - nrows) * ld * sizeof(C));
}

// f(constant computed rows).
template <typename F>
void with_rows(int64_t rows, F f) {
  switch (computed_rows(rows)) {
    case 1:
      return f(RowsConstant<1>{});
    case 2:
      return f(RowsConstant<2>{});
    case 4:
      return f(RowsConstant<4>{});
    default:
      return f(RowsConstant<kFewRows>{});
  }
}

// out row o = the sum over the rows r of factor[r][o] * x row r; `row` has room for one, in whole vectors. Past the
// caches where that is asked for and possible.
template <typename T, typename C, int R>
void outer_products(const C* factor, int64_t ld_factor, int64_t outputs, const C* x, int64_t ldx, int64_t width, C* row,
                    T* out, bool past) {
  constexpr int L = Simd<C>::lanes;
  past = past && can_go_past_caches(out, width);
  for (int64_t o = 0; o < outputs; ++o) {
    C* place = row;
    if constexpr (__is_same(T, C)) {
      if (width % L == 0 && !past) place = out + o * width;
    }
    Vector<C> f[R];
    for (int r = 0; r < R; ++r) f[r] = broadcast(factor[r * ld_factor + o]);
    for (int64_t i = 0; i < width; i += L) {
      Vector<C> sum = f[0] * load(x + i);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r) sum += f[r] * load(x + r * ldx + i);
      store(place + i, sum);
    }
    if (past) {
      narrow_past_caches(row, out + o * width, width);
    } else if (place == row) {
      narrow(row, out + o * width, width);
    }
  }
  if (past) fence_past_caches();
}

// Few rows into a plain panel, zeros beyond them; and back, with zeros where others are computed.
template <typename C>
void panel_of_rows(const C* rows, int64_t ld, int64_t nrows, int64_t features, C* panel) {
  for (int64_t i = 0; i < features; ++i) {
    for (int r = 0; r < kGroup; ++r) panel[i * kGroup + r] = r < nrows ? rows[r * ld + i] : 0;
  }
}
template <typename C>
void rows_of_panel(const C* panel, int64_t features, C* rows, int64_t ld, int64_t nrows) {
  for (int64_t i = 0; i < features; ++i) {
    for (int64_t r = 0; r < nrows; ++r) rows[r * ld + i] = panel[i * kGroup + r];
  }
  clear_absent_rows(rows, ld, nrows);
}

template <typename T_>
struct RowsEngine {
  using T = T_;
  using C = Compute<T>;
  using Weight = T;
  static constexpr WeightForm kForm = WeightForm::kNatural;
  static constexpr Pays kPays{};
  static constexpr int64_t kNaturalOutputs = 0;
  static constexpr bool kBackwardTransposed = false, kSumsAsStored = true, kFromSigns = false;
  static constexpr int64_t kBlockBytes = 640 * 1024, kForwardBlockBytes = kBlockBytes, kChunkBytes = kBlockBytes;
  static constexpr int64_t kSumMultiple = 1, kGradientBytes = sizeof(C);
#if defined(__AVX512BF16__)
  static constexpr bool kDots = __is_same(T, BFloat16);  // products want rows in bfloat16
#else
  static constexpr bool kDots = false;
#endif

  static void begin() {}
  static void end() {}

  // out[row][o] = <in[row], w row o>, rows ld apart.
  static void multiply(int64_t rows, const T* w, int64_t ldw, int64_t width, const C* in, int64_t depth, C* out,
                       int64_t ld) {
    const SubnormalsAreZeros fast;
    with_rows(rows,
              [&](auto constant) { dot_rows<T, C, decltype(constant)::value>(w, ldw, width, in, ld, depth, out, ld); });
  }

#if defined(__AVX512BF16__)
  // The same of rows in bfloat16, as dot_rows wants them, ld_in apart.
  static void multiply(int64_t rows, const BFloat16* w, int64_t ldw, int64_t width, const BFloat16* in, int64_t ld_in,
                       int64_t depth, float* out, int64_t ld) {
    with_rows(rows,
              [&](auto constant) { dot_rows<decltype(constant)::value>(w, ldw, width, in, ld_in, depth, out, ld); });
  }
#endif

  // out[row] += the sum over o < outputs of in[row][o] * w row o.
  static void multiply_back(int64_t rows, const T* w, int64_t ldw, int64_t width, const C* in, int64_t ld,
                            int64_t outputs, C* out, int64_t ld_out) {
    const SubnormalsAreZeros fast;
    with_rows(rows, [&](auto constant) {
      add_rows<T, C, decltype(constant)::value>(w, ldw, outputs, in, ld, width, out, ld_out);
    });
  }

  // grad row o = the sum over the rows of gradient[row][o] * in[row], rows ld apart; `row` has room for one, in whole
  // vectors.
  static void weight_gradient(int64_t rows, const C* gradient, int64_t outputs, const C* in, int64_t width, int64_t ld,
                              C* row, T* grad, bool past) {
    const SubnormalsAreZeros fast;
    with_rows(rows, [&](auto constant) {
      outer_products<T, C, decltype(constant)::value>(gradient, ld, outputs, in, ld, width, row, grad, past);
    });
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
