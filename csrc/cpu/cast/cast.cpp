#include "cast/cast.h"

#include <algorithm>

#include "cast/cast_args.h"
#include "runtime/kernel_tables.h"
#include "runtime/memory.h"
#include "runtime/parallel.h"
#include "runtime/tensors.h"

namespace mtlk {
namespace {

// Values of a task, whose copies fit the nearest cache; and how many make another thread worth its start.
constexpr int64_t kTaskValues = 8192, kThreadValues = 32768;

struct Piece {
  const char* in;
  char* out;
  int64_t values;
};

}  // namespace

bool is_cast_at_once(const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && tensor.is_cpu() &&
         tensor.layout() == at::kStrided && !tensor.is_neg() && !tensor._is_zerotensor() &&
         tensor.is_non_overlapping_and_dense() && tensor.storage().nbytes() >= reached_bytes(tensor);
}

std::vector<at::Tensor> cast_at_once(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> copies;
  std::vector<Piece> pieces;
  copies.reserve(tensors.size());
  int64_t all = 0;
  for (const at::Tensor& tensor : tensors) {
    const at::Tensor own = held(tensor);
    const at::Tensor& copy = copies.emplace_back(pooled(own.sizes(), own.strides(), own.options().dtype(dtype)));
    const auto* const in = static_cast<const char*>(own.const_data_ptr());
    auto* const out = static_cast<char*>(copy.mutable_data_ptr());
    for (int64_t first = 0; first < own.numel(); first += kTaskValues) {
      const int64_t values = std::min(kTaskValues, own.numel() - first);
      pieces.push_back({in + first * own.itemsize(), out + first * copy.itemsize(), values});
      all += values;
    }
  }
  if (pieces.empty()) return copies;
  const bool narrows = dtype != at::kFloat;
  const CastKernels& kernels = kernels_for<CastKernels>(dtype_of(narrows ? copies[0] : tensors[0]));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), divide_up(all, kThreadValues));
  parallel_runs_on(threads, static_cast<int64_t>(pieces.size()), [&](int64_t i, int64_t) {
    const auto [in, out, values] = pieces[i];
    if (narrows) {
      kernels.narrow(reinterpret_cast<const float*>(in), out, values);
    } else {
      kernels.widen(in, reinterpret_cast<float*>(out), values);
    }
  });
  return copies;
}

}  // namespace mtlk
