// csrc/cuda's kernels with blocks at the same time, for ThreadSanitizer: `blocks_at_once NAME` runs them as they are,
// or with one of the faults below. The exit status is 1 where a sum is wrong.

#define MTLK_BLOCKS_AT_ONCE

#include <algorithm>
#include <cstdio>
#include <string>

// clang-format off: in this order
#include "emulated_device.h"
#include "../../csrc/cuda/pcgrad_kernels.h"
// clang-format on

using namespace mtlk;

namespace {

constexpr int kParameters = 40;  // of a chunk each, so that there are two groups of blocks
constexpr int kElements = 37;

// Gradients of which each element is one, but for some that there are not; the table of a call.
struct Gradients {
  explicit Gradients(int tasks) : tasks(tasks), values(kElements, 1.0f), results(kParameters * kElements) {
    entries.assign(kCounters, 0);
    for (Integer p = 0; p <= kParameters; ++p) entries.push_back(p);
    entries.insert(entries.end(), kParameters, kElements);
    entries.insert(entries.end(), kParameters, static_cast<Integer>(Dtype::kFloat32));
    unsigned long long present = 0;
    for (int t = 0; t < tasks; ++t) present |= static_cast<unsigned long long>(t % 3 != 1) << t;
    entries.insert(entries.end(), kParameters, static_cast<Integer>(present));
    for (int p = 0; p < kParameters; ++p) entries.push_back(reinterpret_cast<Integer>(&results[p * kElements]));
    for (int i = 0; i < kParameters * tasks; ++i) {
      entries.push_back(i % tasks % 3 == 1 ? 0 : reinterpret_cast<Integer>(values.data()));
    }
  }

  ParameterTable table() { return {entries.data(), kParameters, tasks}; }

  int tasks;
  std::vector<float> values, results;
  std::vector<Integer> entries;
};

bool gram_is_right(int tasks, unsigned seed) {
  Gradients gradients(tasks);
  std::vector<double> slots(cuda::gram_slots(kParameters, tasks)), gram(tasks * tasks);
  const cuda::GramArguments arguments{gradients.table(), kParameters, slots.data(), gram.data()};
  const char* const error = cuda::with_octets(tasks, [&](auto octets) {
    return emulated::launch(static_cast<unsigned>(cuda::gram_blocks(kParameters)), cuda::kThreads, seed,
                            [&] { cuda::gram_kernel<decltype(octets)::value>(arguments); });
  });
  if (error) return std::puts(error), false;
  for (int i = 0; i < tasks; ++i) {
    for (int j = 0; j < tasks; ++j) {
      if (gram[i * tasks + j] != (i % 3 == 1 || j % 3 == 1 ? 0 : kParameters * kElements)) return false;
    }
  }
  return true;
}

bool combined_is_right(int tasks, unsigned seed) {
  Gradients gradients(tasks);
  const std::vector<double> coefficients(tasks, 0.5);
  const cuda::CombineArguments arguments{gradients.table(), kParameters, coefficients.data()};
  const char* const error = emulated::launch(static_cast<unsigned>(cuda::combine_blocks(kParameters)), cuda::kThreads,
                                             seed, [&] { cuda::combine_kernel(arguments); });
  if (error) return std::puts(error), false;
  const float sum = 0.5f * static_cast<float>(tasks - (tasks + 1) / 3);
  return std::all_of(gradients.results.begin(), gradients.results.end(), [&](float value) { return value == sum; });
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  emulated::without_fence_before = name == "no fence before a counter";
  emulated::without_fence_behind = name == "no fence behind a counter";
  if (name == "two blocks at one address") {
    static int sum = 0;
    emulated::launch(8, 32, 0, [] { sum += threadIdx.x == 0; });
    return 0;
  }
  for (const int tasks : {3, 9}) {
    for (unsigned seed = 0; seed < 2; ++seed) {
      if (!gram_is_right(tasks, seed) || !combined_is_right(tasks, seed)) return 1;
    }
  }
  return 0;
}
