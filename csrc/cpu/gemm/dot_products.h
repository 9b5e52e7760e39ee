// Products of pairs of bfloat16 by AVX-512 dot products, on the operands of AMX tiles.
#pragma once

#include "gemm/pair_factor.h"

namespace mtlk {
namespace MTLK_ISA {

template <int Planes>
class PairProducts {
 public:
  // Of the second level: the least of the processors that have them.
  static constexpr int64_t kCacheBytes = 1024 * 1024;
  static constexpr int64_t kDepthSteps = INT64_MAX;  // of a run: all, as a run's sums go to memory and back

  // What the next expert's pass reads is left to the hardware's prefetchers.
  static constexpr bool kFetchesSaved = false;

  static void begin() {}
  static void end() {}

  // How often a run takes a turn at what is to be done meanwhile, for each step of the depth.
  static constexpr int64_t turns(bool both_a, bool) { return parts(both_a); }

  // out0[i * ld] and out1 = rows of both tiles of a against the first and the second tile of b, or this added to them.
  template <typename Meanwhile>
  static void run(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1, int64_t ld,
                  bool add, const Meanwhile& meanwhile) {
    const int64_t all = parts(a.both);
    for (int64_t part = 0; part < all; ++part) {
      const int64_t row = part * kRows;
      const PairFactor rows{
          (row < kGroup ? a.first : a.second) + row % kGroup * a.row, nullptr, a.step, false, a.row, a.rows - row};
      auto&& work = meanwhile.share(part, 1, all).over(steps);
      if (b.both) {
        rows_against<2>(rows, b, steps, out0 + row * ld, out1 + row * ld, ld, add, work);
      } else {
        rows_against<1>(rows, b, steps, out0 + row * ld, nullptr, ld, add, work);
      }
    }
  }

 private:
  static constexpr int kTerms = Planes == 2 ? 3 : Planes;  // products of planes p and q are kept where p + q is less

  static constexpr int64_t parts(bool both_a) { return (both_a ? 2 : 1) * kGroup / kRows; }

  static constexpr int64_t kRows = 8;  // of a, beside two tiles of b and, of split factors, two sums each

  template <int Tiles, typename Work>
  static void rows_against(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1,
                           int64_t ld, bool add, Work& work) {
    if (a.row == kPairStep) {
      if (a.step > Planes * kPairTile)
        return rows_against<Tiles, true>(a.first, PairStep{}, a.step, a.rows, b, steps, out0, out1, ld, add, work);
      return rows_against<Tiles>(a.first, PairStep{}, a.step, a.rows, b, steps, out0, out1, ld, add, work);
    }
    if constexpr (Planes == 1) rows_against<Tiles>(a.first, a.row, a.step, a.rows, b, steps, out0, out1, ld, add, work);
  }

  // The distance of a's rows, which addresses can hold where it is a constant.
  struct PairStep {
    constexpr operator int64_t() const { return kPairStep; }
  };

  // `Far`: neither is the next step beside this one, where a hardware prefetcher would find it, nor is the place of the
  // result in a near cache.
  template <int Tiles, bool Far = false, typename Row, typename Work>
  static void rows_against(const BFloat16* a, Row row, int64_t a_step, int64_t a_rows, const PairFactor& b,
                           int64_t steps, float* out0, float* out1, int64_t ld, bool add, Work& work) {
    __m512 sums[kRows][Tiles], rest[kRows][Tiles];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int t = 0; t < Tiles; ++t) sums[i][t] = rest[i][t] = _mm512_setzero_ps();
    }
    if constexpr (Far) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
        __builtin_prefetch(out0 + i * ld, 1);
        if constexpr (Tiles == 2) __builtin_prefetch(out1 + i * ld, 1);
      }
    }
    const BFloat16 *first = b.first, *second = b.second;
    for (int64_t k = 0; k < steps; ++k, a += a_step, first += b.step, second += b.step) {
      work.step();
      if constexpr (Far) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) __builtin_prefetch(a + a_step + i * row);
      }
      for (int p = 0; p < Planes; ++p) {
        for (int q = 0; q < Planes && p + q < kTerms; ++q) {
          auto& to = p + q == 0 ? sums : rest;
          multiply<Tiles>(a + p * kPairTile, row, first + q * kPairTile, second + q * kPairTile, to);
        }
      }
    }
    if constexpr (Planes > 1) {
      for (int t = 0; t < Tiles; ++t) {
        alignas(64) float lead[kRows * kGroup], small[kRows * kGroup];
        for (int64_t i = 0; i < kRows; ++i) {
          _mm512_store_ps(lead + i * kGroup, sums[i][t]);
          _mm512_store_ps(small + i * kGroup, rest[i][t]);
        }
        const BFloat16* tile = t == 0 ? b.first : b.second;
        store_sums<Planes, kRows>(a - steps * a_step, a_step, tile, b.step, steps, lead, kGroup, small, a_rows,
                                  t == 0 ? out0 : out1, ld, add);
      }
    } else if (add) {
      leave<Tiles>(sums, out0, out1, ld,
                   [](float* place, __m512 sum) { return _mm512_add_ps(_mm512_loadu_ps(place), sum); });
    } else {
      leave<Tiles>(sums, out0, out1, ld, [](float*, __m512 sum) { return sum; });
    }
  }

  // value(place, sum) to each place. Unrolled: sums that a loop's counter chooses would lie in memory.
  template <int Tiles, typename F>
  MTLK_INLINE static void leave(const __m512 (&sums)[kRows][Tiles], float* out0, float* out1, int64_t ld, F value) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      _mm512_storeu_ps(out0 + i * ld, value(out0 + i * ld, sums[i][0]));
      if constexpr (Tiles == 2) _mm512_storeu_ps(out1 + i * ld, value(out1 + i * ld, sums[i][1]));
    }
  }

  template <int Tiles, typename Row>
  MTLK_INLINE static void multiply(const BFloat16* a, Row row, const BFloat16* first, const BFloat16* second,
                                   __m512 (&sums)[kRows][Tiles]) {
    const BFloat16* third[(kRows + 2) / 3];  // a pointer for every third row: addresses hold one and two distances
    for (int64_t i = 0; i < kRows; i += 3) third[i / 3] = a + i * row;
    for (int64_t pair = 0; pair < kPairStep / 2; ++pair) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(first + pair * 2 * kGroup);
      const __m512bh b1 = Tiles == 1 ? b0 : (__m512bh)_mm512_loadu_si512(second + pair * 2 * kGroup);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
        int32_t both;
        std::memcpy(&both, third[i / 3] + i % 3 * row + pair * 2, sizeof(both));
        const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], value, b0);
        if constexpr (Tiles == 2) sums[i][1] = _mm512_dpbf16_ps(sums[i][1], value, b1);
      }
    }
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
