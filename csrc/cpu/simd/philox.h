// Dropout masks: Philox4x32-10, a counter for every four columns of a row.
#pragma once

#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// Four words for each of 16 counters (column / 4, row, expert, layer).
struct PhiloxWords {
  uint32_t word[4][kGroup];
};

#if defined(__AVX512F__)
MTLK_INLINE void philox_multiply(__m512i x, uint32_t by, __m512i* high, __m512i* low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(by));
  const __m512i even = _mm512_mul_epu32(x, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
#endif

inline void philox(const uint32_t* columns, const uint32_t* rows, uint32_t expert, uint32_t layer, uint64_t seed,
                   PhiloxWords* out) {
  constexpr uint32_t kFactor[2] = {0xD2511F53u, 0xCD9E8D57u}, kStep[2] = {0x9E3779B9u, 0xBB67AE85u};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#if defined(__AVX512F__)
  __m512i a = _mm512_loadu_si512(columns), b = _mm512_loadu_si512(rows);
  __m512i c = _mm512_set1_epi32(static_cast<int>(expert)), d = _mm512_set1_epi32(static_cast<int>(layer));
  for (int round = 0; round < 10; ++round) {
    __m512i high[2], low[2];
    philox_multiply(a, kFactor[0], &high[0], &low[0]);
    philox_multiply(c, kFactor[1], &high[1], &low[1]);
    a = _mm512_xor_si512(_mm512_xor_si512(high[1], b), _mm512_set1_epi32(static_cast<int>(key[0])));
    c = _mm512_xor_si512(_mm512_xor_si512(high[0], d), _mm512_set1_epi32(static_cast<int>(key[1])));
    b = low[1];
    d = low[0];
    for (int i = 0; i < 2; ++i) key[i] += kStep[i];
  }
  _mm512_storeu_si512(out->word[0], a);
  _mm512_storeu_si512(out->word[1], b);
  _mm512_storeu_si512(out->word[2], c);
  _mm512_storeu_si512(out->word[3], d);
#else
  uint32_t a[kGroup], b[kGroup], c[kGroup], d[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    a[i] = columns[i];
    b[i] = rows[i];
    c[i] = expert;
    d[i] = layer;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kGroup; ++i) {
      const uint64_t first = static_cast<uint64_t>(a[i]) * kFactor[0];
      const uint64_t second = static_cast<uint64_t>(c[i]) * kFactor[1];
      a[i] = static_cast<uint32_t>(second >> 32) ^ b[i] ^ key[0];
      c[i] = static_cast<uint32_t>(first >> 32) ^ d[i] ^ key[1];
      b[i] = static_cast<uint32_t>(second);
      d[i] = static_cast<uint32_t>(first);
    }
    for (int i = 0; i < 2; ++i) key[i] += kStep[i];
  }
  std::memcpy(out->word[0], a, sizeof(a));
  std::memcpy(out->word[1], b, sizeof(b));
  std::memcpy(out->word[2], c, sizeof(c));
  std::memcpy(out->word[3], d, sizeof(d));
#endif
}

// Which of a layer's values dropout keeps, and what it multiplies them by.
class Dropout {
 public:
  Dropout(double rate, uint64_t seed, int layer, int expert)
      : seed_(seed),
        threshold_(static_cast<uint64_t>(std::nearbyint(rate * 4294967296.0))),
        scale_(rate < 1 ? 1 / (1 - rate) : 0),
        layer_(static_cast<uint32_t>(layer)),
        expert_(static_cast<uint32_t>(expert)) {}

  double scale() const { return scale_; }

  // kept[f] has a bit for each of the 16 rows from `row` on, for features [0, features).
  void panel(int64_t row, int64_t features, uint16_t* kept) const {
    uint32_t columns[kGroup], rows[kGroup];
    for (int i = 0; i < kGroup; ++i) rows[i] = static_cast<uint32_t>(row + i);
    for (int64_t f = 0; f < features; f += 4) {
      for (uint32_t& column : columns) column = static_cast<uint32_t>(f / 4);
      PhiloxWords words;
      philox(columns, rows, expert_, layer_, seed_, &words);
      for (int64_t j = 0; j < 4 && f + j < features; ++j) kept[f + j] = kept_bits(words.word[j]);
    }
  }

  // A bit for each of 32 columns from `column`, a multiple of 4, on, of rows `row` and `row` + 1.
  void two_rows(int64_t row, int64_t column, uint32_t kept[2]) const {
    uint32_t columns[kGroup], rows[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      columns[i] = static_cast<uint32_t>(column / 4 + i % 8);
      rows[i] = static_cast<uint32_t>(row + i / 8);
    }
    PhiloxWords words;
    philox(columns, rows, expert_, layer_, seed_, &words);
    uint64_t bits = 0;
    for (int j = 0; j < 4; ++j) bits |= every_fourth(kept_bits(words.word[j])) << j;
    kept[0] = static_cast<uint32_t>(bits);
    kept[1] = static_cast<uint32_t>(bits >> 32);
  }

 private:
  uint16_t kept_bits(const uint32_t* words) const {
    uint32_t bits = 0;
#if defined(__AVX512F__)
    if (threshold_ <= 0xffffffffu) {
      const __m512i least = _mm512_set1_epi32(static_cast<int>(threshold_));
      bits = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), least);
    }
#else
    for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(words[i] >= threshold_) << i;
#endif
    return static_cast<uint16_t>(bits);
  }

  // Bit i goes to bit 4 i.
  static uint64_t every_fourth(uint64_t bits) {
    bits = (bits | bits << 24) & 0x000000ff000000ffu;
    bits = (bits | bits << 12) & 0x000f000f000f000fu;
    bits = (bits | bits << 6) & 0x0303030303030303u;
    return (bits | bits << 3) & 0x1111111111111111u;
  }

  uint64_t seed_, threshold_;
  double scale_;
  uint32_t layer_, expert_;
};

// Bit i in lane i.
template <typename Int>
struct LaneBits {
  typedef Int Vector __attribute__((vector_size(kVectorBytes)));
  static MTLK_INLINE Vector lanes() {
    Vector bits;
    for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(Int)); ++i) bits[i] = Int{1} << i;
    return bits;
  }
};

// x * scale in the lanes whose bits are set, x * 0 in the others: like PyTorch's, dropout lets NaN through, and makes
// it of an infinity.
template <typename C>
MTLK_INLINE Vector<C> kept_lanes(Vector<C> x, uint32_t bits, C scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    return x * (Vector<C>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(scale));
  } else {
    return x * (Vector<C>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), _mm512_set1_pd(scale));
  }
#else
  using Int = typename IntOf<sizeof(C)>::type;
  using Lanes = LaneBits<Int>;
  const auto kept = (Lanes::lanes() & static_cast<Int>(bits)) != 0;
  return x * (Vector<C>)((typename Lanes::Vector)(scale - Vector<C>{}) & kept);
#endif
}

}  // namespace MTLK_ISA
}  // namespace mtlk
