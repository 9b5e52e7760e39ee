// What crosses from casts to their kernels.
#pragma once

#include <cstdint>

namespace mtlk {

// Between float32 and the table's dtype, bfloat16 or float16, with the bits that PyTorch's own casts give. For n values
// that lie side by side.
struct CastKernels {
  void (*narrow)(const float* in, void* out, int64_t n);
  void (*widen)(const void* in, float* out, int64_t n);
};

}  // namespace mtlk
