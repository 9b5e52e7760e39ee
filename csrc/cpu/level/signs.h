// Which of a layer's outputs are not <= 0, as relu's gradient asks.
//
// A bit each: in memory in rows of bytes, the first feature in the lowest bit; for a group of rows in words of 32
// features, [word][16], each in a lane as wide as one of the compute type. Bytes of a word are in the order of memory,
// as on every processor that the kernels are built for.
#pragma once

#include "level/level_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename C>
using Word = typename IntOf<sizeof(C)>::word;

// Of a group of rows.
inline int64_t sign_words_size(int64_t features) { return (features + 31) / 32 * kGroup; }

// Adds features [o, o + n), of which there are at most 32, to words: value(i, j) is lanes from j on of feature o + i.
template <typename C, typename F>
MTLK_INLINE void add_signs(int64_t o, int64_t n, Word<C>* words, F value) {
  const int64_t shift = o % 32;
  words += o / 32 * kGroup;
  for (int j = 0; j < kGroup; j += Simd<C>::lanes) {
    Vector<Word<C>> bits{}, bit = broadcast<Word<C>>(1);
    for (int64_t i = 0; i < n; ++i, bit += bit) bits |= value(i, j) <= Vector<C>{} ? Vector<Word<C>>{} : bit;
    store(words + j, load(words + j) | bits << shift);
    if (shift + n > 32) store(words + kGroup + j, load(words + kGroup + j) | bits >> (32 - shift));
  }
}

// copy(word, byte, n) for each word of `nrows` rows of bytes, and its n bytes.
template <typename W, typename Byte, typename F>
MTLK_INLINE void each_word(W* words, Byte* rows, int64_t features, int64_t nrows, F copy) {
  const int64_t bytes = sign_bytes(features);
  for (int64_t r = 0; r < nrows; ++r, rows += bytes) {
    int64_t b = 0;
    for (; b + 4 <= bytes; b += 4) copy(words + b / 4 * kGroup + r, rows + b, 4);
    if (b < bytes) copy(words + b / 4 * kGroup + r, rows + b, bytes - b);
  }
}

// The words of a group of rows to memory, and back; of rows that are not there no bit is set.
template <typename W>
void store_signs(const W* words, int64_t features, int64_t nrows, uint8_t* rows) {
  each_word(words, rows, features, nrows, [](const W* word, uint8_t* byte, int64_t n) { std::memcpy(byte, word, n); });
}
template <typename W>
void load_signs(const uint8_t* rows, int64_t features, int64_t nrows, W* words) {
  std::memset(words, 0, sign_words_size(features) * sizeof(W));
  each_word(words, rows, features, nrows, [](W* word, const uint8_t* byte, int64_t n) { std::memcpy(word, byte, n); });
}

// Of up to 32 values, the first in the lowest bit.
template <typename C, typename T>
MTLK_INLINE uint32_t sign_bits(const T* values, int64_t n) {
  uint32_t bits = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(C) == 4) {
    if (n == 32) {
      for (int i = 0; i < 32; i += Simd<C>::lanes) {
#if defined(__AVX512F__)
        const uint32_t some = _mm512_cmp_ps_mask(load_wide(values + i), _mm512_setzero_ps(), _CMP_NLE_UQ);
#else
        const auto x = reinterpret_cast<__m256>(load_as<T, C>(values + i));
        const uint32_t some = _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ));
#endif
        bits |= some << i;
      }
      return bits;
    }
  }
#endif
  for (int64_t i = 0; i < n; ++i) bits |= static_cast<uint32_t>(!(to_compute(values[i]) <= 0)) << i;
  return bits;
}

// The words of a group of rows, from these.
template <typename C, typename T>
void make_signs(const T* rows, int64_t features, int64_t nrows, Word<C>* words) {
  std::memset(words, 0, sign_words_size(features) * sizeof(Word<C>));
  for (int64_t r = 0; r < nrows; ++r, rows += features) {
    for (int64_t f = 0; f < features; f += 32) {
      words[f / 32 * kGroup + r] = sign_bits<C>(rows + f, features - f < 32 ? features - f : 32);
    }
  }
}

// Whether feature i has its bit set, lanes from j on.
template <typename W>
MTLK_INLINE auto has_sign(const W* words, int64_t i, int j) {
  return (load(words + i / 32 * kGroup + j) & broadcast(static_cast<W>(W{1} << i % 32))) != 0;
}

}  // namespace MTLK_ISA
}  // namespace mtlk
