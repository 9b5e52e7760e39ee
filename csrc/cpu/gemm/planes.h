// Numbers as sums of bfloat16 planes: how they are taken apart.
#pragma once

#include "gemm/pair_factor.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename T>
constexpr int planes_of() {
  return __is_same(T, float) ? 3 : __is_same(T, Half) ? 2 : 1;
}

// Each plane is the rounded rest of those before: see pair_engine.h.
template <typename T>
struct Planes {
  static constexpr int kPlanes = planes_of<T>();
  static constexpr int kInfinities = 0x18;  // a class of numbers

  // value = the sum of the planes.
  MTLK_INLINE static void split(__m512 value, __m256i* planes) {
    planes[0] = (__m256i)_mm512_cvtneps_pbh(value);
    if constexpr (kPlanes > 1) {
      const __m512 leading = plane_values(planes[0]);
      if (__builtin_expect(_mm512_fpclass_ps_mask(leading, kInfinities) != 0, 0)) return split_extremes(value, planes);
      value = _mm512_sub_ps(value, leading);
      planes[1] = (__m256i)_mm512_cvtneps_pbh(value);
    }
    if constexpr (kPlanes > 2) planes[2] = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(value, plane_values(planes[1])));
  }

  // The same. Behind an infinite leading plane the others are zero, so that its sign survives; a finite number that
  // would round to it is cut.
  __attribute__((noinline, cold)) static void split_extremes(__m512 value, __m256i* planes) {
    const __mmask16 infinite = _mm512_fpclass_ps_mask(plane_values((__m256i)_mm512_cvtneps_pbh(value)), kInfinities);
    const __m512i cut = _mm512_srli_epi32(_mm512_castps_si512(value), 16);
    planes[0] = _mm512_mask_cvtepi32_epi16((__m256i)_mm512_cvtneps_pbh(value), infinite, cut);
    for (int p = 1; p < kPlanes; ++p) {
      const __m512 taken = plane_values(planes[p - 1]);
      const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(taken, kInfinities));
      value = _mm512_maskz_sub_ps(finite, value, taken);
      planes[p] = (__m256i)_mm512_cvtneps_pbh(value);
    }
  }

  static __m512 plane_values(__m256i plane) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(plane), 16));
  }

  // The planes of two vectors, one behind the other.
  MTLK_INLINE static void split_two(__m512 first, __m512 second, __m512i* planes) {
    if constexpr (kPlanes > 1) {
      if (__builtin_expect(infinite(leading<false>(first), leading<false>(second)), 0)) {
        return split_two_extremes(first, second, planes);
      }
    }
    for (int p = 0; p < kPlanes - 1; ++p) {
      const __m512 a = leading<false>(first), b = leading<false>(second);
      planes[p] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      first = _mm512_sub_ps(first, a);
      second = _mm512_sub_ps(second, b);
    }
    planes[kPlanes - 1] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }

  // The same of value(i, 0) and value(i + 1, 0), or zeros where there are but n.
  template <typename F>
  MTLK_INLINE static void split_two(int64_t i, int64_t n, F& value, __m512i* planes) {
    const auto first = reinterpret_cast<__m512>(value(i, 0));
    split_two(first, i + 1 < n ? reinterpret_cast<__m512>(value(i + 1, 0)) : _mm512_setzero_ps(), planes);
  }

  __attribute__((noinline, cold)) static void split_two_extremes(__m512 first, __m512 second, __m512i* planes) {
    __m256i a[kPlanes], b[kPlanes];
    split(first, a);
    split(second, b);
    for (int p = 0; p < kPlanes; ++p) planes[p] = behind(a[p], b[p]);
  }

  static __m512i behind(__m256i first, __m256i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }

  MTLK_INLINE static bool infinite(__m512 first, __m512 second) {
    return (_mm512_fpclass_ps_mask(first, kInfinities) | _mm512_fpclass_ps_mask(second, kInfinities)) != 0;
  }

  // Up to 16 rows of up to 32 values into planes [16][32], zeros in the margins; `Cut`: see split_row.
  template <bool Cut>
  static void split_rows(const T* rows, int64_t row_stride, int64_t column_stride, int64_t nrows, int64_t width,
                         BFloat16* out) {
    if constexpr (kPlanes == 1) {
      if (width == kPairStep && nrows == kGroup) return copy_block(rows, row_stride, column_stride, out);
    }
    if (column_stride == 1 && width == kPairStep) {  // straight from whole rows
      for (int64_t r = 0; r < kGroup; ++r) {
        const T* row = rows + r * row_stride;
        const __m512 zero = _mm512_setzero_ps();
        split_row<Cut>(r < nrows ? load_wide(row) : zero, r < nrows ? load_wide(row + kGroup) : zero,
                       out + r * kPairStep);
      }
      return;
    }
    alignas(64) float wide[kPairTile];
    if (nrows < kGroup || width < kPairStep) std::memset(wide, 0, sizeof(wide));
    if (column_stride == 1) {
      for (int64_t r = 0; r < nrows; ++r) widen(rows + r * row_stride, wide + r * kPairStep, width);
    } else {  // columns are contiguous: read them as rows, and turn them
      alignas(64) float turned[kPairStep * kGroup];
      if (nrows < kGroup || width < kPairStep) std::memset(turned, 0, sizeof(turned));
      for (int64_t c = 0; c < width; ++c) {
        if (nrows == kGroup) {
          _mm512_store_ps(turned + c * kGroup, load_wide(rows + c * column_stride));
        } else {
          widen(rows + c * column_stride, turned + c * kGroup, nrows);
        }
      }
      for (int64_t c = 0; c < kPairStep; c += kGroup) transpose16(turned + c * kGroup, kGroup, wide + c, kPairStep);
    }
    for (int64_t i = 0; i < kPairTile; i += kPairStep) {
      split_row<Cut>(_mm512_load_ps(wide + i), _mm512_load_ps(wide + i + kGroup), out + i);
    }
  }

  // 16 rows of 32 bfloat16 as they are.
  static void copy_block(const T* rows, int64_t row_stride, int64_t column_stride, BFloat16* out) {
    if (column_stride == 1) {
      for (int64_t r = 0; r < kGroup; ++r)
        std::memcpy(out + r * kPairStep, rows + r * row_stride, kPairStep * sizeof(T));
      return;
    }
    alignas(64) BFloat16 pairs[kPairTile];  // of columns, which are contiguous
    for (int64_t c = 0; c < kPairStep; c += 2) {
      const auto* first = reinterpret_cast<const __m256i*>(rows + c * column_stride);
      const auto* second = reinterpret_cast<const __m256i*>(rows + (c + 1) * column_stride);
      _mm512_store_si512(pairs + c * kGroup, in_pairs(behind(_mm256_loadu_si256(first), _mm256_loadu_si256(second))));
    }
    transpose16(pairs, kGroup, out, kPairStep / 2);
  }

  // 32 values to a row of each plane, as split makes them, whose conversions there and back take longer. Or, for one of
  // two factors, with planes that are cut where split rounds them, which takes less still: they are as exact, and terms
  // of a product that are dropped are below its rounding error as long as the other factor's planes are rounded.
  template <bool Cut>
  MTLK_INLINE static void split_row(__m512 low, __m512 high, BFloat16* out) {
    if constexpr (kPlanes > 1) {
      const __m512 a = Cut ? low : leading<false>(low), b = Cut ? high : leading<false>(high);
      if (__builtin_expect(infinite(a, b), 0)) return split_row_of_extremes(low, high, out);
    }
    for (int p = 0; p < kPlanes - 1; ++p, out += kPairTile) {
      const __m512 first = leading<Cut>(low), second = leading<Cut>(high);
      _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));
      low = _mm512_sub_ps(low, first);
      high = _mm512_sub_ps(high, second);
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  // Rounded or cut to the bits of a bfloat16; of a NaN it may be anything, as what is left of it is a NaN.
  template <bool Cut>
  MTLK_INLINE static __m512 leading(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    if constexpr (!Cut) bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000u)));
  }

  __attribute__((noinline, cold)) static void split_row_of_extremes(__m512 low, __m512 high, BFloat16* out) {
    __m512i planes[kPlanes];
    split_two_extremes(low, high, planes);
    for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(out + p * kPairTile, planes[p]);
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
