// Products with weights take subnormal numbers for zeros. A processor takes some hundred times longer for a
// multiply-add that meets one, and panels have 16 rows side by side: one row whose gradient has all but vanished slows
// all of them.
#pragma once

#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// While one lives, this thread's arithmetic reads subnormal numbers as zeros and leaves zeros where it would make them.
// Processors other than x86 make them as ever.
class SubnormalsAreZeros {
 public:
#if defined(__SSE__)
  SubnormalsAreZeros() : before_(__builtin_ia32_stmxcsr()) {
    if (before_ != (before_ | kBoth)) __builtin_ia32_ldmxcsr(before_ | kBoth);
  }
  ~SubnormalsAreZeros() {
    if (before_ != (before_ | kBoth)) __builtin_ia32_ldmxcsr(before_);
  }

 private:
  static constexpr unsigned kBoth = 0x8040;  // results to zero, and operands
  const unsigned before_;
#else
  SubnormalsAreZeros() {}
  ~SubnormalsAreZeros() {}
#endif

 public:
  SubnormalsAreZeros(const SubnormalsAreZeros&) = delete;
  SubnormalsAreZeros& operator=(const SubnormalsAreZeros&) = delete;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
