// How lists of parameters are cut into pieces of equal work, for the host and for the device.
//
// A call's gradients travel as one array of 64-bit integers, which mtlkernels/ops/pcgrad/cuda.py builds:
//
//   counters   kCounters zeros, for blocks to count themselves with
//   starts     for each parameter the number of chunks before it, then the number of all chunks
//   sizes      for each parameter its number of elements
//   formats    for each parameter its Dtype, plus kAligned where every address is a multiple of 16
//   presents   for each parameter a bit a task, set where the task has a gradient
//   results    for each parameter the address of the weighted sum; used by combine alone
//   gradients  parameters x tasks addresses, 0 where there is none
#pragma once

#include "dtypes.h"

namespace mtlk {

constexpr int kMaxTasks = 64;
constexpr int kChunk = 4096;  // elements; whole vectors of every dtype, and offsets in it fit an int
constexpr int kCounters = 64;
constexpr int kAligned = 256;

using Integer = long long;

// A piece of one parameter.
struct Chunk {
  Integer parameter, first;
  int count;
};

// The array above.
class ParameterTable {
 public:
  MTLK_HOST_DEVICE ParameterTable(Integer* entries, Integer parameters, int tasks)
      : entries_(entries), parameters_(parameters), tasks_(tasks) {}

  MTLK_HOST_DEVICE int tasks() const { return tasks_; }
  MTLK_HOST_DEVICE Integer* counter(int index) const { return entries_ + index; }
  MTLK_HOST_DEVICE Integer start(Integer p) const { return entries_[kCounters + p]; }
  MTLK_HOST_DEVICE Integer size(Integer p) const { return column(0, p); }
  MTLK_HOST_DEVICE Dtype dtype(Integer p) const { return static_cast<Dtype>(column(1, p) % kAligned); }
  MTLK_HOST_DEVICE bool aligned(Integer p) const { return column(1, p) >= kAligned; }
  MTLK_HOST_DEVICE unsigned long long present(Integer p) const { return column(2, p); }
  MTLK_HOST_DEVICE Integer result(Integer p) const { return column(3, p); }
  MTLK_HOST_DEVICE Integer gradient(Integer p, int task) const { return column(4, p * tasks_ + task); }

  // Chunk `index` of all, whose parameter is `from` or a later one.
  MTLK_HOST_DEVICE Chunk chunk(Integer index, Integer from) const {
    Integer low = from, high = parameters_;  // start(low) <= index < start(high)
    if (index < start(from + 1)) high = from + 1;
    while (high - low > 1) {
      const Integer middle = low + (high - low) / 2;
      (start(middle) <= index ? low : high) = middle;
    }
    const Integer first = (index - start(low)) * kChunk, left = size(low) - first;
    return {low, first, static_cast<int>(left < kChunk ? left : kChunk)};
  }

 private:
  MTLK_HOST_DEVICE Integer column(int which, Integer row) const {
    return entries_[kCounters + parameters_ + 1 + which * parameters_ + row];
  }

  Integer* entries_;
  Integer parameters_;
  int tasks_;
};

}  // namespace mtlk
