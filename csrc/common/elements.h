// Gradients' elements, sixteen bytes at a time, as doubles; for the host and for the device.
#pragma once

#include "host_device.h"

namespace mtlk {

// The numbers that a parameter table has for dtypes.
enum Kind { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct alignas(16) Vector {
  unsigned words[4];
};

template <typename To, typename From>
MTLK_HOST_DEVICE inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

MTLK_HOST_DEVICE inline float half_to_float(unsigned short half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const unsigned biased = exponent == 31 ? 255 : exponent + 112;
  return bits_of<float>(sign | biased << 23 | fraction << 13);
#endif
}

// To the nearest, ties to even, as PyTorch rounds.
MTLK_HOST_DEVICE inline unsigned short float_to_half(float value) {
#if defined(__CUDA_ARCH__)
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  const unsigned bits = bits_of<unsigned>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the sum with a half has the result's unit in the last place
    half = bits_of<unsigned>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  }
  return static_cast<unsigned short>(sign | half);
#endif
}

MTLK_HOST_DEVICE inline unsigned short float_to_bfloat16(float value) {
  const unsigned bits = bits_of<unsigned>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// How many elements of a kind a vector holds, what one is in memory, and its value.
template <int kind>
struct Element;

template <>
struct Element<kFloat32> {
  using Bits = unsigned;
  static constexpr int kPerVector = 4;
  MTLK_HOST_DEVICE static double value(Bits bits) { return bits_of<float>(bits); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return bits_of<unsigned>(static_cast<float>(value)); }
};

template <>
struct Element<kBFloat16> {
  using Bits = unsigned short;
  static constexpr int kPerVector = 8;
  MTLK_HOST_DEVICE static double value(Bits bits) { return bits_of<float>(static_cast<unsigned>(bits) << 16); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return float_to_bfloat16(static_cast<float>(value)); }
};

template <>
struct Element<kFloat16> {
  using Bits = unsigned short;
  static constexpr int kPerVector = 8;
  MTLK_HOST_DEVICE static double value(Bits bits) { return half_to_float(bits); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return float_to_half(static_cast<float>(value)); }
};

template <>
struct Element<kFloat64> {
  using Bits = unsigned long long;
  static constexpr int kPerVector = 2;
  MTLK_HOST_DEVICE static double value(Bits bits) { return bits_of<double>(bits); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return bits_of<unsigned long long>(value); }
};

// Element `i` of a vector in registers: with `i` a constant, a few shifts.
template <int kind>
MTLK_HOST_DEVICE inline typename Element<kind>::Bits get(const Vector& vector, int i) {
  using Bits = typename Element<kind>::Bits;
  if constexpr (sizeof(Bits) == 2) {
    return static_cast<Bits>(vector.words[i / 2] >> 16 * (i % 2));
  } else if constexpr (sizeof(Bits) == 4) {
    return vector.words[i];
  } else {
    return vector.words[2 * i] | static_cast<Bits>(vector.words[2 * i + 1]) << 32;
  }
}

template <int kind>
MTLK_HOST_DEVICE inline void put(Vector& vector, int i, typename Element<kind>::Bits bits) {
  using Bits = typename Element<kind>::Bits;
  if constexpr (sizeof(Bits) == 2) {
    const unsigned word = vector.words[i / 2];
    vector.words[i / 2] = i % 2 ? (word & 0xffffu) | static_cast<unsigned>(bits) << 16 : (word & 0xffff0000u) | bits;
  } else if constexpr (sizeof(Bits) == 4) {
    vector.words[i] = bits;
  } else {
    vector.words[2 * i] = static_cast<unsigned>(bits);
    vector.words[2 * i + 1] = static_cast<unsigned>(bits >> 32);
  }
}

// Addresses come from a table; on the device these say that they are in global memory, and what is read is only read.
template <typename T>
MTLK_HOST_DEVICE inline T read(const T* source) {
#if defined(__CUDA_ARCH__)
  return __ldg(source);
#else
  return *source;
#endif
}

MTLK_HOST_DEVICE inline Vector read(const Vector* source) {
#if defined(__CUDA_ARCH__)
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(source));
  return {{words.x, words.y, words.z, words.w}};
#else
  return *source;
#endif
}

template <typename T>
MTLK_HOST_DEVICE inline void write(T* target, T value) {
#if defined(__CUDA_ARCH__)
  __stcs(target, value);
#else
  *target = value;
#endif
}

MTLK_HOST_DEVICE inline void write(Vector* target, const Vector& value) {
#if defined(__CUDA_ARCH__)
  const unsigned* words = value.words;
  __stcs(reinterpret_cast<uint4*>(target), make_uint4(words[0], words[1], words[2], words[3]));
#else
  *target = value;
#endif
}

// Elements `first` and following, aligned and all there; zeros where there is no source.
template <int kind>
MTLK_HOST_DEVICE inline Vector load_whole(const typename Element<kind>::Bits* source, int first) {
  return source == nullptr ? Vector{} : read(reinterpret_cast<const Vector*>(source + first));
}

// Elements `first` and following of `count`, one by one; zeros past the end and where there is no source.
template <int kind>
MTLK_HOST_DEVICE inline Vector load_part(const typename Element<kind>::Bits* source, int first, int count) {
  Vector vector = {};
  MTLK_UNROLL
  for (int i = 0; i < Element<kind>::kPerVector; ++i) {
    if (source != nullptr && first + i < count) put<kind>(vector, i, read(source + first + i));
  }
  return vector;
}

template <int kind>
MTLK_HOST_DEVICE inline void store_whole(typename Element<kind>::Bits* target, int first, const Vector& vector) {
  write(reinterpret_cast<Vector*>(target + first), vector);
}

template <int kind>
MTLK_HOST_DEVICE inline void store_part(typename Element<kind>::Bits* target, int first, int count,
                                        const Vector& vector) {
  MTLK_UNROLL
  for (int i = 0; i < Element<kind>::kPerVector; ++i) {
    if (first + i < count) write(target + first + i, get<kind>(vector, i));
  }
}

}  // namespace mtlk
