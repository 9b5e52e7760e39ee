#include "runtime/tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/zeros.h>

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

at::Tensor resolved(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (tensor._is_zerotensor()) return at::zeros(tensor.sizes(), tensor.options());
  return tensor.is_neg() ? tensor.resolve_neg() : tensor;
}

at::Tensor held(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true));
}

void check_plain(const at::Tensor& tensor) {
  MTLK_CHECK_TYPE(!tensor.unsafeGetTensorImpl()->is_python_dispatch() && !tensor.is_neg() && !tensor._is_zerotensor(),
                  "a plain tensor was expected");
}

size_t reached_bytes(const at::Tensor& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
}

void check_dense(const char* name, const at::Tensor& x, at::ScalarType dtype) { check_dense(name, -1, x, dtype); }

void check_dense(const char* name, int64_t i, const at::Tensor& x, at::ScalarType dtype) {
  const auto what = [&] { return i < 0 ? std::string(name) : c10::str(name, "[", i, "]"); };
  MTLK_CHECK_TYPE(x.defined(), what(), " must be a tensor");
  check_plain(x);
  MTLK_CHECK_TYPE(x.scalar_type() == dtype && x.layout() == at::kStrided, what(), " must be a dense tensor of ", dtype,
                  ", got ", x.layout(), " of ", x.scalar_type());
  MTLK_CHECK_VALUE(x.is_cpu(), what(), " must be on the CPU, got ", x.device());
  const size_t reached = reached_bytes(x);
  MTLK_CHECK_VALUE(x.storage().nbytes() >= reached, what(), " must have ", reached, " bytes of memory, got ",
                   x.storage().nbytes());
}

at::Tensor with_unit_stride(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

}  // namespace mtlk
