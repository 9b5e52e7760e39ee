// Vectors of the width that this translation unit is compiled for, and conversions between storage and compute types.
//
// The kernels are compiled once for each instruction set (see CMakeLists.txt), each time in a namespace of its own,
// and include no header whose inline functions could leak into the portable parts of the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/dtypes.h"
#include "runtime/poison.h"

#ifndef MTLK_ISA
#error "MTLK_ISA names the namespace of the instruction set"
#endif

namespace mtlk {
namespace MTLK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

// Rows of the batch are handled in groups of 16: a group's values of one feature lie side by side, see panels.h.
constexpr int kGroup = 16;
inline int64_t group_count(int64_t n) { return (n + kGroup - 1) / kGroup; }
inline int64_t padded_to_group(int64_t n) { return group_count(n) * kGroup; }

// Of n rows those from `row` on that are in one group.
inline int64_t rows_of_group(int64_t n, int64_t row) { return n - row < kGroup ? n - row : kGroup; }

// Elements of storage that a vector holds.
template <typename T>
constexpr int64_t kPerVector = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename C>
struct Simd {
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(C));
  static constexpr int per_group = kGroup / lanes;
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
};

template <typename C>
using Vector = typename Simd<C>::Vector;

template <typename C>
MTLK_INLINE Vector<C> load(const C* p) {
  Vector<C> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename C>
MTLK_INLINE void store(C* p, Vector<C> v) {
  std::memcpy(p, &v, sizeof(v));
}

// Keeps what was loaded in a register: the compiler would load it anew for each product that it is a factor of.
template <typename V>
MTLK_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

// How sums are left in memory. Past the caches where they are large and nobody reads them soon: lines that are written
// whole need not be read first. Only where can_go_past_caches, and with a fence before other threads are told.
enum class Leave { kSet, kAdd, kPastCaches };

// A vector's bytes, to a place that is a multiple of it.
MTLK_INLINE void bytes_past_caches(void* p, const void* vector) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_load_si512(vector));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_load_si256(static_cast<const __m256i*>(vector)));
#else
  std::memcpy(p, vector, kVectorBytes);
#endif
}
template <typename C>
MTLK_INLINE void store_past_caches(C* p, Vector<C> v) {
  bytes_past_caches(p, &v);
}
MTLK_INLINE void fence_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether rows of whole vectors, ld elements apart, can. The lowest instruction set has no such way.
template <typename T>
bool can_go_past_caches(const T* rows, int64_t ld) {
  return kVectorBytes > 16 && reinterpret_cast<uintptr_t>(rows) % kVectorBytes == 0 && ld % kPerVector<T> == 0;
}

template <typename C>
MTLK_INLINE Vector<C> broadcast(C value) {
  return value - Vector<C>{};  // exact, and keeps the sign of zero
}

// a * b + c, rounded once wherever there is an instruction for it, which the compiler takes in some loops alone.
template <typename C>
MTLK_INLINE Vector<C> multiply_add(Vector<C> a, Vector<C> b, Vector<C> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == sizeof(float)) {
    return reinterpret_cast<Vector<C>>(_mm512_fmadd_ps(a, b, c));
  } else {
    return reinterpret_cast<Vector<C>>(_mm512_fmadd_pd(a, b, c));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == sizeof(float)) {
    return reinterpret_cast<Vector<C>>(_mm256_fmadd_ps(a, b, c));
  } else {
    return reinterpret_cast<Vector<C>>(_mm256_fmadd_pd(a, b, c));
  }
#else
  return a * b + c;
#endif
}

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// Integers of a size in bytes.
template <size_t Size>
struct IntOf {
  using type = int32_t;
  using word = uint32_t;
};
template <>
struct IntOf<8> {
  using type = int64_t;
  using word = uint64_t;
};

// <a, b> of n values.
template <typename C>
C dot(const C* a, const C* b, int64_t n) {
  constexpr int L = Simd<C>::lanes;
  Vector<C> sum{};
  int64_t i = 0;
  for (; i + L <= n; i += L) sum += load(a + i) * load(b + i);
  C total = 0;
  for (int lane = 0; lane < L; ++lane) total += sum[lane];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// Elements of the storage types, one at a time.
MTLK_INLINE float to_compute(float value) { return value; }
MTLK_INLINE double to_compute(double value) { return value; }
MTLK_INLINE float to_compute(BFloat16 value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }
MTLK_INLINE float to_compute(Half value) {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(value.bits)));
#else
  return half_to_float(value.bits);
#endif
}

MTLK_INLINE void from_compute(float value, float* out) { *out = value; }
MTLK_INLINE void from_compute(double value, double* out) { *out = value; }
MTLK_INLINE void from_compute(float value, BFloat16* out) { out->bits = float_to_bfloat16(value); }
MTLK_INLINE void from_compute(float value, Half* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
#else
  out->bits = float_to_half(value);
#endif
}

#if defined(__AVX512F__)
// 16 values as float.
MTLK_INLINE __m512 load_wide(const float* p) { return _mm512_loadu_ps(p); }
MTLK_INLINE __m512 load_wide(const BFloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
MTLK_INLINE __m512 load_wide(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

// Contiguous runs. The loops vectorise; float16 and AVX-512 have instructions that the compiler does not find.
template <typename T, typename C>
MTLK_INLINE void widen(const T* in, C* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2 && sizeof(C) == 4) {
    for (; i + 16 <= n; i += 16) {
      _mm512_storeu_ps(out + i, load_wide(in + i));
    }
  }
#elif defined(__F16C__)
  if constexpr (__is_same(T, Half) && sizeof(C) == 4) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    }
  }
#if defined(__AVX2__)
  if constexpr (__is_same(T, BFloat16) && sizeof(C) == 4) {
    for (; i + 8 <= n; i += 8) {
      const __m256i raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
      _mm256_storeu_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)));
    }
  }
#endif
#endif
  for (; i < n; ++i) out[i] = to_compute(in[i]);
}

// L lanes of the compute type from storage.
template <typename T, typename C>
MTLK_INLINE Vector<C> load_as(const T* p) {
  if constexpr (__is_same(T, C)) {
    return load(p);
  } else {
    alignas(64) C wide[Simd<C>::lanes];
    widen(p, wide, Simd<C>::lanes);
    return load(wide);
  }
}

template <typename T, typename C>
MTLK_INLINE void narrow(const C* in, T* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, BFloat16)) {
    for (; i + 32 <= n; i += 32) {
      const __m512bh raw = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + i + 16), _mm512_loadu_ps(in + i));
      std::memcpy(out + i, &raw, sizeof(raw));
    }
    for (; i + 16 <= n; i += 16) {
      const __m256bh raw = _mm512_cvtneps_pbh(_mm512_loadu_ps(in + i));
      std::memcpy(out + i, &raw, sizeof(raw));
    }
  }
#endif
#if defined(__AVX512F__)
  if constexpr (__is_same(T, Half) && sizeof(C) == 4) {
    for (; i + 16 <= n; i += 16) {
      const __m256i raw = _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), raw);
    }
  }
#elif defined(__F16C__)
  if constexpr (__is_same(T, Half) && sizeof(C) == 4) {
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < n; ++i) from_compute(in[i], out + i);
}

// The same past the caches, of whole vectors.
template <typename T, typename C>
MTLK_INLINE void narrow_past_caches(const C* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kPerVector<T>) {
    alignas(kVectorBytes) T values[kPerVector<T>];
    narrow(in + i, values, kPerVector<T>);
    bytes_past_caches(out + i, values);
  }
}

// A bump allocator over a caller's buffer; every piece starts on a cache line. Without a buffer it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : first_(static_cast<char*>(memory)), next_(first_) {}
  template <typename U>
  U* take(int64_t count) {
    U* const piece = reinterpret_cast<U*>(next_);
    if (first_ != nullptr) fence(piece, count * static_cast<int64_t>(sizeof(U)));
    next_ += bytes<U>(count);
    return piece;
  }
  int64_t taken() const { return next_ - first_; }
  template <typename U>
  static int64_t bytes(int64_t count) {
    return padded(count * static_cast<int64_t>(sizeof(U)));
  }

 private:
  char *first_, *next_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
