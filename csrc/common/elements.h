// Gradients' elements, sixteen bytes at a time, as doubles; for the host and for the device.
#pragma once

#include "dtypes.h"

namespace mtlk {

struct alignas(16) Vector {
  unsigned words[4];
};

// How many elements of a dtype a vector holds, what one is in memory, and its value.
template <Dtype dtype>
struct Element;

template <>
struct Element<Dtype::kFloat32> {
  using Bits = unsigned;
  static constexpr int kPerVector = 4;
  MTLK_HOST_DEVICE static double value(Bits bits) { return bits_of<float>(bits); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return bits_of<unsigned>(static_cast<float>(value)); }
};

template <>
struct Element<Dtype::kBFloat16> {
  using Bits = unsigned short;
  static constexpr int kPerVector = 8;
  MTLK_HOST_DEVICE static double value(Bits bits) { return bits_of<float>(static_cast<unsigned>(bits) << 16); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return float_to_bfloat16(static_cast<float>(value)); }
};

template <>
struct Element<Dtype::kFloat16> {
  using Bits = unsigned short;
  static constexpr int kPerVector = 8;
  MTLK_HOST_DEVICE static double value(Bits bits) { return half_to_float(bits); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return float_to_half(static_cast<float>(value)); }
};

template <>
struct Element<Dtype::kFloat64> {
  using Bits = unsigned long long;
  static constexpr int kPerVector = 2;
  MTLK_HOST_DEVICE static double value(Bits bits) { return bits_of<double>(bits); }
  MTLK_HOST_DEVICE static Bits rounded(double value) { return bits_of<unsigned long long>(value); }
};

// Element `i` of a vector in registers: with `i` a constant, a few shifts.
template <Dtype dtype>
MTLK_HOST_DEVICE inline typename Element<dtype>::Bits get(const Vector& vector, int i) {
  using Bits = typename Element<dtype>::Bits;
  if constexpr (sizeof(Bits) == 2) {
    return static_cast<Bits>(vector.words[i / 2] >> 16 * (i % 2));
  } else if constexpr (sizeof(Bits) == 4) {
    return vector.words[i];
  } else {
    return vector.words[2 * i] | static_cast<Bits>(vector.words[2 * i + 1]) << 32;
  }
}

template <Dtype dtype>
MTLK_HOST_DEVICE inline void put(Vector& vector, int i, typename Element<dtype>::Bits bits) {
  using Bits = typename Element<dtype>::Bits;
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
template <Dtype dtype>
MTLK_HOST_DEVICE inline Vector load_whole(const typename Element<dtype>::Bits* source, int first) {
  return source == nullptr ? Vector{} : read(reinterpret_cast<const Vector*>(source + first));
}

// Elements `first` and following of `count`, one by one; zeros past the end and where there is no source.
template <Dtype dtype>
MTLK_HOST_DEVICE inline Vector load_part(const typename Element<dtype>::Bits* source, int first, int count) {
  Vector vector = {};
  MTLK_UNROLL
  for (int i = 0; i < Element<dtype>::kPerVector; ++i) {
    if (source != nullptr && first + i < count) put<dtype>(vector, i, read(source + first + i));
  }
  return vector;
}

template <Dtype dtype>
MTLK_HOST_DEVICE inline void store_whole(typename Element<dtype>::Bits* target, int first, const Vector& vector) {
  write(reinterpret_cast<Vector*>(target + first), vector);
}

template <Dtype dtype>
MTLK_HOST_DEVICE inline void store_part(typename Element<dtype>::Bits* target, int first, int count,
                                        const Vector& vector) {
  MTLK_UNROLL
  for (int i = 0; i < Element<dtype>::kPerVector; ++i) {
    if (first + i < count) write(target + first + i, get<dtype>(vector, i));
  }
}

}  // namespace mtlk
