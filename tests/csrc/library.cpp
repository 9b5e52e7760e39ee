// csrc/common, and csrc/cuda's kernels on an emulated device, as a library that tests load through ctypes.

#include <algorithm>
#include <cmath>

// clang-format off: in this order
#include "emulated_device.h"
#include "../../csrc/cuda/pcgrad_kernels.h"
// clang-format on

using namespace mtlk;

extern "C" {

// Chunk `index`, looked for from parameter `from` on: parameter, first element, number of elements.
void chunk_at(Integer* table, Integer parameters, int tasks, Integer index, Integer from, Integer* found) {
  const Chunk chunk = ParameterTable(table, parameters, tasks).chunk(index, from);
  found[0] = chunk.parameter, found[1] = chunk.first, found[2] = chunk.count;
}

Integer gram_slots(Integer chunks, int tasks) { return cuda::gram_slots(chunks, tasks); }

float to_float(unsigned short half) { return half_to_float(half); }
unsigned short to_half(float value) { return float_to_half(value); }
unsigned short to_bfloat16(float value) { return float_to_bfloat16(value); }

const char* gram(Integer* table, Integer parameters, int tasks, Integer chunks, double* slots, double* out,
                 unsigned seed) {
  const cuda::GramArguments arguments{{table, parameters, tasks}, chunks, slots, out};
  const auto blocks = static_cast<unsigned>(cuda::gram_blocks(chunks));
  return cuda::with_octets(tasks, [&](auto octets) {
    return emulated::launch(blocks, cuda::kThreads, seed,
                            [&] { cuda::gram_kernel<decltype(octets)::value>(arguments); });
  });
}

const char* weights(const double* gram, const Integer* order, double* rows, double* coefficients, int tasks, int steps,
                    double max_norm, double eps, bool include_self, bool normalize, bool project, bool mean,
                    unsigned seed) {
  const cuda::WeightsArguments arguments{
      gram, order, rows, coefficients, tasks, steps, {max_norm, eps, include_self, normalize, project}, mean};
  return emulated::launch(1, kMaxTasks, seed, [&] { cuda::weights_kernel(arguments); });
}

const char* combine(Integer* table, Integer parameters, int tasks, Integer chunks, const double* coefficients,
                    unsigned seed) {
  const cuda::CombineArguments arguments{{table, parameters, tasks}, chunks, coefficients};
  const auto blocks = static_cast<unsigned>(cuda::combine_blocks(chunks));
  return emulated::launch(blocks, cuda::kThreads, seed, [&] { cuda::combine_kernel(arguments); });
}

// Kernels that are wrong, to see that this is noticed.

const char* returns_before_a_barrier() {
  return emulated::launch(1, 64, 0, [] {
    if (threadIdx.x == 40) return;
    __syncthreads();
  });
}

const char* takes_different_barriers() {
  return emulated::launch(1, 64, 0, [] {
    if (threadIdx.x == 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

// The sum of what the neighbours of all threads wrote, without a barrier in between.
double reads_too_early(unsigned seed) {
  double sum = 0, written[64] = {};
  emulated::launch(1, 64, seed, [&] {
    written[threadIdx.x] = 1;
    sum += written[(threadIdx.x + 1) % 64];
  });
  return sum;
}

}  // extern "C"
