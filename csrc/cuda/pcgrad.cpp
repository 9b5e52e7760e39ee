// Registers PCGrad's CUDA kernels as operators of the library mtlkernels_cuda, which mtlkernels/ops/pcgrad/cuda.py
// calls.
//
// Written against torch's stable ABI, so that one build serves every CUDA build of torch from 2.10 on. Gradients come
// as addresses in `table`; see csrc/common/chunks.h.

#define TORCH_TARGET_VERSION 0x020a000000000000ULL  // 2.10
#define USE_CUDA                                    // declares the current CUDA stream, also in a CPU build's headers

#include "pcgrad.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using mtlk::Integer;
using torch::stable::Tensor;

// The current stream of the tensor's device, which is the current device as long as this lives.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "pcgrad on CUDA: ", error); }

int checked_tasks(int64_t tasks) {
  STD_TORCH_CHECK(tasks >= 1 && tasks <= mtlk::kMaxTasks, "num_tasks must be in [1, 64], got ", tasks);
  return static_cast<int>(tasks);
}

mtlk::ParameterTable parameter_table(const Tensor& table, int64_t parameters, int tasks) {
  const int64_t entries = mtlk::kCounters + 1 + parameters * (5 + tasks);
  STD_TORCH_CHECK(table.numel() == entries, "table must have ", entries, " entries, got ", table.numel());
  return {data<Integer>(table), parameters, tasks};
}

void gram(const Tensor& table, int64_t parameters, int64_t chunks, const Tensor& slots, const Tensor& out) {
  const int tasks = checked_tasks(out.size(0));
  STD_TORCH_CHECK(slots.numel() >= mtlk::cuda::gram_slots(chunks, tasks), "slots has ", slots.numel(), " entries");
  const Stream stream(table);
  check(mtlk::cuda::launch_gram(
      {parameter_table(table, parameters, tasks), chunks, data<double>(slots), data<double>(out)}, stream.get()));
}

void weights(const Tensor& gram, const Tensor& order, const Tensor& rows, const Tensor& coefficients, double max_norm,
             double eps, bool include_self, bool normalize, bool project, bool mean) {
  const Stream stream(gram);
  const mtlk::ProjectionOptions options{max_norm, eps, include_self, normalize, project};
  check(mtlk::cuda::launch_weights(
      {data<const double>(gram), data<const Integer>(order), data<double>(rows), data<double>(coefficients),
       checked_tasks(gram.size(0)), static_cast<int>(order.size(1)), options, mean},
      stream.get()));
}

void combine(const Tensor& table, int64_t parameters, int64_t chunks, const Tensor& coefficients) {
  const Stream stream(table);
  check(mtlk::cuda::launch_combine({parameter_table(table, parameters, checked_tasks(coefficients.numel())), chunks,
                                    data<const double>(coefficients)},
                                   stream.get()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mtlkernels_cuda, library) {
  library.def("gram(Tensor(a!) table, int parameters, int chunks, Tensor(b!) slots, Tensor(c!) out) -> ()");
  library.def(
      "weights(Tensor gram, Tensor order, Tensor(a!) rows, Tensor(b!) coefficients, float max_norm, float eps,"
      " bool include_self, bool normalize, bool project, bool mean) -> ()");
  library.def("combine(Tensor table, int parameters, int chunks, Tensor coefficients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mtlkernels_cuda, CUDA, library) {
  library.impl("gram", TORCH_BOX(&gram));
  library.impl("weights", TORCH_BOX(&weights));
  library.impl("combine", TORCH_BOX(&combine));
}
