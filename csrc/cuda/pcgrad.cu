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

template <int octets>
void launch_gram_of(const GramArguments& arguments, void* stream) {
  const auto blocks = static_cast<unsigned>(gram_blocks(arguments.chunks));
  gram_kernel<octets><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
}

}  // namespace

const char* launch_gram(const GramArguments& arguments, void* stream) {
  switch (octets(arguments.table.tasks())) {
    case 1:
      launch_gram_of<1>(arguments, stream);
      break;
    case 2:
      launch_gram_of<2>(arguments, stream);
      break;
    case 4:
      launch_gram_of<4>(arguments, stream);
      break;
    default:
      launch_gram_of<8>(arguments, stream);
  }
  return launched();
}

const char* launch_weights(const WeightsArguments& arguments, void* stream) {
  weights_kernel<<<1, kMaxTasks, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return launched();
}

const char* launch_combine(const CombineArguments& arguments, void* stream) {
  if (arguments.chunks == 0) return nullptr;
  const auto blocks =
      static_cast<unsigned>(arguments.chunks < kMaxCombineBlocks ? arguments.chunks : kMaxCombineBlocks);
  combine_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return launched();
}

}  // namespace mtlk::cuda
