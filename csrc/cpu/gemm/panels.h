// Panels: how activations lie inside the kernels.
//
// The batch is cut into groups of 16 rows. Within a group the 16 values of one feature lie side by side, so a feature
// is one vector (or a few), weights are read in their natural layout as broadcast operands, and the output of one layer
// is the input of the next without any repacking. A plain panel is [feature][16] of the compute type; a paired panel,
// for AMX, is [feature / 2][16][2] of bfloat16.
#pragma once

#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
// 8 x 8, as transpose16.
MTLK_INLINE void transpose8(const uint32_t* in, int64_t ld_in, uint32_t* out, int64_t ld_out) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in + i * ld_in));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out + i * ld_out), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(out + (i + 4) * ld_out), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// Whether a transpose writes whole lines, so that they may go past the caches.
#if defined(__AVX512F__)
constexpr bool kTransposesLines = true;
#else
constexpr bool kTransposesLines = false;
#endif

// 16 x 16 transpose of 32-bit elements: rows of `in`, `ld_in` apart, become columns of `out`. Past the caches where
// kTransposesLines and can_go_past_caches.
template <bool Past = false>
MTLK_INLINE void transpose16(const void* in, int64_t ld_in, void* out, int64_t ld_out) {
  const uint32_t* a = static_cast<const uint32_t*>(in);
  uint32_t* b = static_cast<uint32_t*>(out);
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(a + i * ld_in);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  const auto leave = [](uint32_t* place, __m512i row) {
    Past ? _mm512_stream_si512(reinterpret_cast<__m512i*>(place), row) : _mm512_storeu_si512(place, row);
  };
  for (int i = 0; i < 4; ++i) {
    leave(b + (i + 0) * ld_out, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    leave(b + (i + 4) * ld_out, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    leave(b + (i + 8) * ld_out, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    leave(b + (i + 12) * ld_out, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 16; j += 8) transpose8(a + i * ld_in + j, ld_in, b + j * ld_out + i, ld_out);
  }
#else
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) b[j * ld_out + i] = a[i * ld_in + j];
  }
#endif
}

template <bool Past = false, typename C>
MTLK_INLINE void transpose_block(const C* in, int64_t ld_in, C* out, int64_t ld_out) {
  if constexpr (sizeof(C) == 4) {
    transpose16<Past>(in, ld_in, out, ld_out);
  } else {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) out[j * ld_out + i] = in[i * ld_in + j];
    }
  }
}

// What completes an operand's values where there is nothing to complete.
struct Unchanged {
  template <typename C>
  void operator()(C*, int64_t, int64_t, int64_t) const {}
};

// Pairs of bfloat16 are elements of 32 bits, so that one transpose turns 32 features of 16 whole rows.
constexpr int kPairs = 2 * kGroup;

#if defined(__AVX512F__)
MTLK_INLINE void pack_pairs(const BFloat16* rows, int64_t ld, float* panel) {
  alignas(64) uint32_t pairs[kGroup * kGroup];
  alignas(64) BFloat16 block[kGroup * kPairs];
  if (ld % 2 != 0) {
    for (int r = 0; r < kGroup; ++r) std::memcpy(block + r * kPairs, rows + r * ld, sizeof(BFloat16) * kPairs);
  }
  transpose16(ld % 2 != 0 ? block : rows, ld % 2 != 0 ? kGroup : ld / 2, pairs, kGroup);
  for (int i = 0; i < kGroup; ++i) {
    const __m512i pair = _mm512_load_si512(pairs + i * kGroup);
    _mm512_storeu_si512(panel + 2 * i * kGroup, _mm512_slli_epi32(pair, 16));
    _mm512_storeu_si512(panel + (2 * i + 1) * kGroup, _mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000u)));
  }
}
#endif

#if defined(__AVX512BF16__)
// 32 bfloat16 in pairs: one of the first 16 and one of the others.
MTLK_INLINE __m512i in_pairs(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[2 * kGroup] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                              21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

template <bool Past>
MTLK_INLINE void unpack_pairs(const float* panel, BFloat16* rows, int64_t ld) {
  alignas(64) uint32_t pairs[kGroup * kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const __m512 even = _mm512_loadu_ps(panel + 2 * i * kGroup), odd = _mm512_loadu_ps(panel + (2 * i + 1) * kGroup);
    _mm512_store_si512(pairs + i * kGroup, in_pairs((__m512i)_mm512_cvtne2ps_pbh(odd, even)));
  }
  if (ld % 2 == 0) return transpose16<Past>(pairs, kGroup, rows, ld / 2);
  alignas(64) BFloat16 block[kGroup * kPairs];
  transpose16(pairs, kGroup, block, kGroup);
  for (int r = 0; r < kGroup; ++r) std::memcpy(rows + r * ld, block + r * kPairs, sizeof(BFloat16) * kPairs);
}
#endif

// One group of rows [nrows][features] into a plain panel; absent rows become zero.
template <typename T, typename C>
void pack_panel(const T* rows, int64_t ld, int64_t nrows, int64_t features, C* panel) {
  alignas(64) C block[kGroup * kGroup];
  int64_t f = 0;
#if defined(__AVX512F__)
  if constexpr (__is_same(T, BFloat16) && sizeof(C) == 4) {
    for (; nrows == kGroup && f + kPairs <= features; f += kPairs) pack_pairs(rows + f, ld, panel + f * kGroup);
  }
#endif
  for (; f < features; f += kGroup) {
    const int64_t width = features - f < kGroup ? features - f : kGroup;
    if constexpr (__is_same(T, C)) {
      if (width == kGroup && nrows == kGroup) {
        transpose_block(rows + f, ld, panel + f * kGroup, kGroup);
        continue;
      }
    }
    if (width < kGroup || nrows < kGroup) std::memset(block, 0, sizeof(block));
    for (int64_t r = 0; r < nrows; ++r) widen(rows + r * ld + f, block + r * kGroup, width);
    if (width == kGroup) {
      transpose_block(block, kGroup, panel + f * kGroup, kGroup);
    } else {
      for (int64_t j = 0; j < width; ++j) {
        for (int r = 0; r < kGroup; ++r) panel[(f + j) * kGroup + r] = block[r * kGroup + j];
      }
    }
  }
}

// Zeroes the rows of a plain panel that are not there.
template <typename C>
void clear_absent(int64_t nrows, int64_t features, C* panel) {
  if (nrows == kGroup) return;
  for (int64_t i = 0; i < features; ++i) std::memset(panel + i * kGroup + nrows, 0, (kGroup - nrows) * sizeof(C));
}

// A plain panel back to rows; whole lines of them past the caches.
template <bool Past, typename T, typename C>
void unpack_panel(const C* panel, int64_t features, T* rows, int64_t ld, int64_t nrows) {
  alignas(64) C block[kGroup * kGroup];
  int64_t f = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, BFloat16) && sizeof(C) == 4) {
    for (; nrows == kGroup && f + kPairs <= features; f += kPairs) unpack_pairs<Past>(panel + f * kGroup, rows + f, ld);
  }
#endif
  for (; f < features; f += kGroup) {
    const int64_t width = features - f < kGroup ? features - f : kGroup;
    if (width == kGroup) {
      if constexpr (__is_same(T, C)) {
        if (nrows == kGroup) {
          transpose_block<Past>(panel + f * kGroup, kGroup, rows + f, ld);
          continue;
        }
      }
      transpose_block(panel + f * kGroup, kGroup, block, kGroup);
    } else {
      for (int64_t j = 0; j < width; ++j) {
        for (int r = 0; r < kGroup; ++r) block[r * kGroup + j] = panel[(f + j) * kGroup + r];
      }
    }
    for (int64_t r = 0; r < nrows; ++r) narrow(block + r * kGroup, rows + r * ld + f, width);
  }
}

// The same, `past` the caches where it can be.
template <typename T, typename C>
void unpack_panel(const C* panel, int64_t features, T* rows, int64_t ld, int64_t nrows, bool past = false) {
  if (kTransposesLines && past && can_go_past_caches(rows, ld))
    return unpack_panel<true>(panel, features, rows, ld, nrows);
  unpack_panel<false>(panel, features, rows, ld, nrows);
}

}  // namespace MTLK_ISA
}  // namespace mtlk
