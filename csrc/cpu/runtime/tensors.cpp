#include "runtime/tensors.h"

#include "runtime/check.h"

namespace mtlk {

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      MTLK_CHECK_TYPE(false, "dtype must be float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
      __builtin_unreachable();
  }
}

void check_plain(const at::Tensor& tensor) {
  MTLK_CHECK_TYPE(!tensor.unsafeGetTensorImpl()->is_python_dispatch(), "a plain tensor was expected");
}

at::Tensor with_unit_stride(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

}  // namespace mtlk
