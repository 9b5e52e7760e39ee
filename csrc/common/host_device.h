// Marks functions that the host and the device share or that are always inlined, and loops that are unrolled on the
// device.
#pragma once

#if defined(__CUDACC__)
#define MTLK_HOST_DEVICE __host__ __device__
#define MTLK_INLINE __forceinline__
#else
#define MTLK_HOST_DEVICE
#if !defined(MTLK_INLINE)  // which counts of branches want otherwise
#define MTLK_INLINE inline __attribute__((always_inline))
#endif
#endif

#if defined(__CUDA_ARCH__)
#define MTLK_UNROLL _Pragma("unroll")
#define MTLK_UNROLL_8 _Pragma("unroll 8")
#else
#define MTLK_UNROLL
#define MTLK_UNROLL_8
#endif
