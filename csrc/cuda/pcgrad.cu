// Launches PCGrad's kernels.

// clang-format off: in this order
#include "device.h"
#include "pcgrad_kernels.h"
// clang-format on

namespace mtlk::cuda {
namespace {

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_gram(const GramArguments& arguments, void* stream) {
  const auto blocks = static_cast<unsigned>(gram_blocks(arguments.chunks));
  return with_octets(arguments.table.tasks(), [&](auto octets) {
    gram_kernel<decltype(octets)::value><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
    return launched();
  });
}

const char* launch_weights(const WeightsArguments& arguments, void* stream) {
  weights_kernel<<<1, kMaxTasks, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return launched();
}

const char* launch_combine(const CombineArguments& arguments, void* stream) {
  if (arguments.chunks == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(combine_blocks(arguments.chunks));
  combine_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return launched();
}

}  // namespace mtlk::cuda
