// Dtypes, what an element is in memory, and conversions; for the host and for the device.
//
// Kernels are compiled once for each instruction set, so that what they share with other code is always inlined.
#pragma once

#include "host_device.h"

namespace mtlk {

// In the order of tables of kernels, and the numbers that a parameter table has.
enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };
constexpr int kDtypes = 4;

// bfloat16 and float16 are kept as bits.
struct BFloat16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};

template <typename To, typename From>
MTLK_HOST_DEVICE MTLK_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

MTLK_HOST_DEVICE MTLK_INLINE float half_to_float(unsigned short half) {
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
MTLK_HOST_DEVICE MTLK_INLINE unsigned short float_to_half(float value) {
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

MTLK_HOST_DEVICE MTLK_INLINE unsigned short float_to_bfloat16(float value) {
  const unsigned bits = bits_of<unsigned>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace mtlk
