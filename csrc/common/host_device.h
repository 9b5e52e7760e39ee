// Marks functions that the host and the device share, and loops that are unrolled on the device.
#pragma once

#if defined(__CUDACC__)
#define MTLK_HOST_DEVICE __host__ __device__
#define MTLK_UNROLL _Pragma("unroll")
#else
#define MTLK_HOST_DEVICE
#define MTLK_UNROLL
#endif
