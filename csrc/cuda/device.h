// What only a device has; tests/csrc/emulated_device.h has the same for the host.
#pragma once

#define MTLK_GLOBAL __global__
#define MTLK_DEVICE __device__

namespace mtlk::cuda {

// sums += A B for A [8, 4] and B [4, 8], spread over a warp: lane 4 r + q holds A[r, q], B[q, r] and the sums of row r
// at columns 2 q and 2 q + 1. Every lane of the warp must come here together; volatile, so that it is not moved to
// where only some do.
__device__ inline void mma(double (&sums)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sums[0]), "+d"(sums[1])
               : "d"(a), "d"(b));
}

__device__ inline long long count_up(long long* counter) {
  return static_cast<long long>(atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull));
}

// What other blocks of this launch wrote is in the second-level cache.
__device__ inline double read_shared_by_blocks(const double* source) { return __ldcg(source); }

}  // namespace mtlk::cuda
