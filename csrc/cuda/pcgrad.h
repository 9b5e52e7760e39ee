// What the registration of PCGrad's CUDA operators calls; includes neither CUDA nor torch.
//
// Each function puts one kernel on a stream, waits for nothing, and returns what went wrong, or nullptr.
#pragma once

#include "../common/chunks.h"
#include "../common/projection.h"

namespace mtlk::cuda {

// The Gram matrix is summed in a fixed order, whatever the device: each of at most kMaxBlocks blocks has a slot for its
// sums, the last block of a group of kGroup adds the group's slots up, and the last of all the groups'.
constexpr int kMaxBlocks = 1024;
constexpr int kGroup = 32;
static_assert(kMaxBlocks / kGroup < kCounters);

// Tasks are taken in eights, 1, 2, 4 or 8 of them, and the Gram matrix in tiles of 8 x 8, those on and above the
// diagonal.
constexpr int octets(int tasks) { return tasks <= 8 ? 1 : tasks <= 16 ? 2 : tasks <= 32 ? 4 : 8; }
MTLK_HOST_DEVICE constexpr int tiles(int octets) { return octets * (octets + 1) / 2; }
constexpr int kTile = 64;

template <int number>
struct Constant {
  static constexpr int value = number;
};

// Calls f with the octets of so many tasks, a constant.
template <typename F>
auto with_octets(int tasks, F f) {
  const int count = octets(tasks);
  return count == 1   ? f(Constant<1>())
         : count == 2 ? f(Constant<2>())
         : count == 4 ? f(Constant<4>())
                      : f(Constant<8>());
}

constexpr Integer gram_blocks(Integer chunks) { return chunks < 1 ? 1 : chunks < kMaxBlocks ? chunks : kMaxBlocks; }
constexpr Integer kMaxCombineBlocks = 1 << 16;
constexpr Integer combine_blocks(Integer chunks) { return chunks < kMaxCombineBlocks ? chunks : kMaxCombineBlocks; }
constexpr Integer gram_slots(Integer chunks, int tasks) { return gram_blocks(chunks) * tiles(octets(tasks)) * kTile; }

struct GramArguments {
  ParameterTable table;
  Integer chunks;
  double* slots;  // gram_slots(chunks, tasks)
  double* gram;   // [tasks, tasks]
};

struct WeightsArguments {
  const double* gram;
  const Integer* order;  // [tasks, steps]
  double* rows;          // [tasks, tasks]
  double* coefficients;  // [tasks]
  int tasks, steps;
  ProjectionOptions options;
  bool mean;
};

struct CombineArguments {
  ParameterTable table;
  Integer chunks;
  const double* coefficients;
};

const char* launch_gram(const GramArguments& arguments, void* stream);
const char* launch_weights(const WeightsArguments& arguments, void* stream);
const char* launch_combine(const CombineArguments& arguments, void* stream);

}  // namespace mtlk::cuda
