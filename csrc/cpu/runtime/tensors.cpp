#include "runtime/tensors.h"

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
      TORCH_CHECK_TYPE(false, "mtlkernels: dtype must be float32, float64, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

void check_plain(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(!tensor.unsafeGetTensorImpl()->is_python_dispatch(), "mtlkernels: a plain tensor was expected");
}

at::Tensor with_unit_stride(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

}  // namespace mtlk
