// What products of pairs of bfloat16 multiply.
#pragma once

#include "gemm/panels.h"
#include "simd/prefetch.h"

namespace mtlk {
namespace MTLK_ISA {

constexpr int64_t kPairStep = 32;                  // of the depth, one tile
constexpr int64_t kPairTile = kGroup * kPairStep;  // elements of a tile

// Two neighbouring tiles of a factor, or one, each with its planes behind it; from one step of the depth to the next it
// moves on by `step` elements. The rows of a tile are `row` elements apart: a tile lies in one piece, or is a window of
// a wider matrix.
struct PairFactor {
  const BFloat16 *first, *second;
  int64_t step;
  bool both;
  int64_t row = kPairStep;
  int64_t rows = 2 * kGroup;  // of the tiles that are there; others may hold anything
};

// out[i][16] = the product of a tile row by row, by multiply-adds of the numbers that the planes stand for. Where a
// factor is infinite, products of single planes may have either sign, and add up to NaN where their sum is an infinity.
template <int Planes, int Rows>
__attribute__((noinline)) void product_of_whole_numbers(const BFloat16* a, int64_t a_step, const BFloat16* b,
                                                        int64_t b_step, int64_t steps, float* out) {
  __m512 sums[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) sums[i] = _mm512_setzero_ps();
  alignas(64) float left[Rows][kPairStep];
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    for (int i = 0; i < Rows; ++i) {
      for (int64_t j = 0; j < kPairStep; j += kGroup) {
        __m512 value = _mm512_setzero_ps();
        for (int p = Planes - 1; p >= 0; --p) {
          value = _mm512_add_ps(value, load_wide(a + p * kPairTile + i * kPairStep + j));
        }
        _mm512_store_ps(left[i] + j, value);
      }
    }
    for (int64_t pair = 0; pair < kPairStep / 2; ++pair) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int p = Planes - 1; p >= 0; --p) {
        const __m512i both = _mm512_loadu_si512(b + p * kPairTile + pair * 2 * kGroup);
        even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
        odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000u))));
      }
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(left[i][2 * pair]), even, sums[i]);
        sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(left[i][2 * pair + 1]), odd, sums[i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) _mm512_storeu_ps(out + i * kGroup, sums[i]);
}

// out = lead + rest, which may be null, on top of what is there if `add`: sums of products of planes for Rows rows of
// a, of which `rows` are there, and a tile of b. Rows of lead are lead_ld apart, and may be those of out itself where
// nothing is added.
template <int Planes, int Rows>
MTLK_INLINE void store_sums(const BFloat16* a, int64_t a_step, const BFloat16* b, int64_t b_step, int64_t steps,
                            const float* lead, int64_t lead_ld, const float* rest, int64_t rows, float* out, int64_t ld,
                            bool add) {
  const auto sum = [&](int i) {
    const __m512 leading = _mm512_loadu_ps(lead + i * lead_ld);
    return rest ? _mm512_add_ps(leading, _mm512_load_ps(rest + i * kGroup)) : leading;
  };
  __mmask16 unordered = 0;
  for (int i = 0; i < Rows; i += 2) {
    const __m512 even = sum(i), odd = sum(i + 1);
    if (i < rows) {
      const __mmask16 found = _mm512_cmp_ps_mask(even, i + 1 < rows ? odd : even, _CMP_UNORD_Q);
      unordered = static_cast<__mmask16>(unordered | found);
    }
    if (add || (!rest && lead == out)) continue;
    _mm512_storeu_ps(out + i * ld, even);
    _mm512_storeu_ps(out + (i + 1) * ld, odd);
  }
  if (__builtin_expect(unordered != 0, 0)) {
    alignas(64) float whole[Rows * kGroup];
    product_of_whole_numbers<Planes, Rows>(a, a_step, b, b_step, steps, whole);
    for (int i = 0; i < Rows; ++i) {
      const __m512 value = _mm512_load_ps(whole + i * kGroup);
      _mm512_storeu_ps(out + i * ld, add ? _mm512_add_ps(_mm512_loadu_ps(out + i * ld), value) : value);
    }
  } else if (add) {
    for (int i = 0; i < Rows; ++i) _mm512_storeu_ps(out + i * ld, _mm512_add_ps(_mm512_loadu_ps(out + i * ld), sum(i)));
  }
}

}  // namespace MTLK_ISA
}  // namespace mtlk
