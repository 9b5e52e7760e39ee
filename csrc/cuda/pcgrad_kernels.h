// PCGrad's kernels: the Gram matrix of the tasks' gradients, the projections, the weighted sum.
//
// Whoever includes this includes device.h first, or what stands in for it on a host: tests/csrc runs these kernels
// there.
#pragma once

#include "../common/elements.h"
#include "pcgrad.h"

namespace mtlk::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Calls f with the kind of a parameter's elements, a constant, and the arguments: a lambda that captured these would
// take more registers.
template <typename F, typename... Arguments>
MTLK_DEVICE inline void with_kind(int kind, F f, Arguments&... arguments) {
  switch (kind) {
    case kFloat32:
      f(Constant<kFloat32>(), arguments...);
      break;
    case kBFloat16:
      f(Constant<kBFloat16>(), arguments...);
      break;
    case kFloat16:
      f(Constant<kFloat16>(), arguments...);
      break;
    default:
      f(Constant<kFloat64>(), arguments...);
  }
}

// Where a chunk of a task's gradient starts; nullptr where there is none.
template <int kind>
MTLK_DEVICE const typename Element<kind>::Bits* source(const ParameterTable& table, const Chunk& chunk, int task) {
  const Integer address = task < table.tasks() ? table.gradient(chunk.parameter, task) : 0;
  return address == 0 ? nullptr : reinterpret_cast<const typename Element<kind>::Bits*>(address) + chunk.first;
}

// Gram ---------------------------------------------------------------------------------------------------------------
// Sums of products in double: exact for float32 and narrower but for the additions, and no square leaves its range,
// which float32 holds only with a scale a task and chunk. Where doubles run at half the rate of floats (sm_80, 90, 100)
// this should cost no time: by the rates that NVIDIA states, a position of T = 8 float32 gradients takes an H100's
// multiprocessor 2.4 clocks to read, 0.5 to convert and 0.5 to multiply on the tensor cores; with T = 64 it is 19, 4
// and
// 18. Where doubles run at 1/64 (consumer cards) the multiplications take a few times as long as the reads.
//
// A warp's product of two tiles, mma(sums, a, b), takes from lane 4 r + q the element of row r at position q of both,
// so that a lane loads 16 bytes of one task and multiplies them position by position: a diagonal tile takes the same
// operand twice, nothing passes through shared memory, and nothing is read twice. Fewer than 8 tasks leave rows free;
// these take other positions of the same tasks, whose sums are added at the end.

// How many vectors a lane has on their way at a time, over all octets.
template <int octets>
constexpr int kAhead = octets > 4 ? 1 : 4 / octets;

template <int octets>
using Sums = double[tiles(octets)][2];

// Rows of the first tile that one set of tasks takes: a power of two, 8 with more than 4 tasks.
MTLK_DEVICE inline int rows_of(int tasks) { return tasks > 4 ? 8 : tasks > 2 ? 4 : tasks; }

template <int octets, int kind>
MTLK_DEVICE void add_products(Sums<octets>& sums, const ParameterTable& table, const Chunk& chunk) {
  using Bits = typename Element<kind>::Bits;
  constexpr int kPer = Element<kind>::kPerVector, kSteps = kAhead<octets>;
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  const int rows = octets == 1 ? rows_of(table.tasks()) : 8;
  const bool aligned = table.aligned(chunk.parameter);
  const Bits* sources[octets];
  MTLK_UNROLL
  for (int o = 0; o < octets; ++o) sources[o] = source<kind>(table, chunk, 8 * o + row % rows);
  const int vectors = (chunk.count + kPer - 1) / kPer;
  const int step = 32 / rows;  // vectors of a task that a warp loads at once
  for (int base = warp * kSteps * step; base < vectors; base += kWarps * kSteps * step) {
    Vector loaded[kSteps][octets];
    const int mine = base + row / rows * 4 + quarter;
    const auto load_by = [&](auto load) {
      MTLK_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        MTLK_UNROLL
        for (int o = 0; o < octets; ++o) loaded[s][o] = load(sources[o], (mine + s * step) * kPer);
      }
    };
    if (aligned && (base + kSteps * step) * kPer <= chunk.count) {  // the same for a warp: loads without branches
      load_by([](const Bits* from, int first) { return load_whole<kind>(from, first); });
    } else {
      load_by([&](const Bits* from, int first) { return load_part<kind>(from, first, chunk.count); });
    }
    __syncwarp();
    MTLK_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      MTLK_UNROLL
      for (int i = 0; i < kPer; ++i) {
        double values[octets];
        MTLK_UNROLL
        for (int o = 0; o < octets; ++o) values[o] = Element<kind>::value(get<kind>(loaded[s][o], i));
        MTLK_UNROLL
        for (int a = 0, tile = 0; a < octets; ++a) {
          MTLK_UNROLL
          for (int b = a; b < octets; ++b) mma(sums[tile++], values[a], values[b]);
        }
      }
    }
  }
}

// Adds the warps' sums to the block's, one warp after another, and clears them. Only pairs of tasks that have gradients
// count: a zero that stands for None would turn another task's infinity into NaN.
template <int octets>
MTLK_DEVICE void flush(Sums<octets>& sums, unsigned long long present, int rows, double* total) {
  const int row = threadIdx.x % 32 / 4;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == static_cast<int>(threadIdx.x) / 32) {
      MTLK_UNROLL
      for (int a = 0, tile = 0; a < octets; ++a) {
        MTLK_UNROLL
        for (int b = a; b < octets; ++b, ++tile) {
          MTLK_UNROLL
          for (int c = 0; c < 2; ++c) {
            const int column = threadIdx.x % 4 * 2 + c;
            const bool both = present >> (8 * a + row % rows) & present >> (8 * b + column % rows) & 1;
            if (both) total[tile * kTile + row * 8 + column] += sums[tile][c];
            sums[tile][c] = 0;
          }
        }
      }
    }
    __syncthreads();
  }
}

// Whether this block is the last of `expected` to come here; what all of them wrote before can then be read.
MTLK_DEVICE inline bool arrives_last(Integer* counter, int expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // after the barrier, so that it holds for what the whole block wrote
    last = count_up(counter) == expected - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Sum over `count` slots of one entry, in order.
MTLK_DEVICE inline double sum_slots(const double* slots, int count, int stride) {
  double sum = 0;
  MTLK_UNROLL_8
  for (int i = 0; i < count; ++i) sum += read_shared_by_blocks(slots + static_cast<Integer>(i) * stride);
  return sum;
}

// The entry of tasks i <= j from the tiles' sums.
template <int octets>
MTLK_DEVICE double gram_entry(const double* total, int i, int j, int rows) {
  if constexpr (octets == 1) {
    double sum = 0;
    for (int set = 0; set < 8; set += rows) sum += total[(set + i) * 8 + set + j];
    return sum;
  } else {
    const int a = i / 8, b = j / 8, tile = a * octets - a * (a - 1) / 2 + b - a;
    return total[tile * kTile + i % 8 * 8 + j % 8];
  }
}

template <int octets>
MTLK_GLOBAL void __launch_bounds__(kThreads) gram_kernel(const GramArguments arguments) {
  constexpr int kEntries = tiles(octets) * kTile;
  __shared__ double total[kEntries];
  const ParameterTable& table = arguments.table;
  const int tasks = table.tasks(), rows = octets == 1 ? rows_of(tasks) : 8;
  const int thread = threadIdx.x, blocks = gridDim.x, block = blockIdx.x;
  for (int entry = thread; entry < kEntries; entry += kThreads) total[entry] = 0;
  __syncthreads();

  Sums<octets> sums = {};
  Integer parameter = 0;
  unsigned long long present = 0;
  for (Integer index = block; index < arguments.chunks; index += blocks) {
    const Chunk chunk = table.chunk(index, parameter);
    parameter = chunk.parameter;
    if (table.present(parameter) != present) {  // the same for all threads
      if (present != 0) flush<octets>(sums, present, rows, total);
      present = table.present(parameter);
    }
    const auto add = [](auto kind, auto&... args) { add_products<octets, decltype(kind)::value>(args...); };
    with_kind(table.kind(parameter), add, sums, table, chunk);
  }
  flush<octets>(sums, present, rows, total);

  double* slots = arguments.slots;
  for (int entry = thread; entry < kEntries; entry += kThreads) {
    slots[static_cast<Integer>(block) * kEntries + entry] = total[entry];
  }
  const int group = block / kGroup, groups = (blocks + kGroup - 1) / kGroup;
  const int members = group + 1 < groups ? kGroup : blocks - group * kGroup;
  if (!arrives_last(table.counter(1 + group), members)) return;  // the same for all threads, as below
  double* mine = slots + static_cast<Integer>(group) * kGroup * kEntries;
  for (int entry = thread; entry < kEntries; entry += kThreads) {
    mine[entry] = sum_slots(mine + entry, members, kEntries);
  }
  if (!arrives_last(table.counter(0), groups)) return;
  for (int entry = thread; entry < kEntries; entry += kThreads) {
    total[entry] = sum_slots(slots + entry, groups, kGroup * kEntries);
  }
  __syncthreads();
  for (int at = thread; at < tasks * tasks; at += kThreads) {
    const int i = at / tasks, j = at % tasks;
    arguments.gram[at] = gram_entry<octets>(total, i < j ? i : j, i < j ? j : i, rows);
  }
}

// Weights ------------------------------------------------------------------------------------------------------------
// One block, a thread a task. The row that a thread works on is in shared memory; reading the Gram matrix through the
// first-level cache leaves room for that.

MTLK_GLOBAL void __launch_bounds__(kMaxTasks) weights_kernel(const WeightsArguments arguments) {
  __shared__ double scale[kMaxTasks];
  __shared__ double rows[kMaxTasks * (kMaxTasks + 1)];
  const int tasks = arguments.tasks, i = threadIdx.x;
  const int stride = tasks | 1;  // odd, so that threads at the same column use different banks
  if (i == 0) {
    projection_scales(arguments.gram, tasks, arguments.options, scale, [](double square) { return sqrt(square); });
  }
  __syncthreads();
  if (i < tasks) {
    project_row(arguments.gram, scale, tasks, i, arguments.order + i * arguments.steps, arguments.steps,
                arguments.options, rows + i * stride);
  }
  __syncthreads();
  if (i < tasks) {
    double sum = 0;
    for (int row = 0; row < tasks; ++row) {
      const double value = rows[row * stride + i];
      arguments.rows[row * tasks + i] = value;
      sum += value;
    }
    arguments.coefficients[i] = arguments.mean ? sum / tasks : sum;
  }
}

// Combine ------------------------------------------------------------------------------------------------------------
// A thread takes 16 bytes of the result, and has those of kTogether tasks on their way at a time. In double:
// coefficients can exceed float32's range where gradients are tiny.

constexpr int kTogether = 8;

template <int kind>
MTLK_DEVICE void combine_chunk(const ParameterTable& table, const Chunk& chunk, const double* coefficients) {
  using Bits = typename Element<kind>::Bits;
  constexpr int kPer = Element<kind>::kPerVector;
  const bool aligned = table.aligned(chunk.parameter);
  Bits* result = reinterpret_cast<Bits*>(table.result(chunk.parameter)) + chunk.first;
  for (int first = threadIdx.x * kPer; first < chunk.count; first += kThreads * kPer) {
    const bool vector = aligned && first + kPer <= chunk.count;
    double sums[kPer] = {};
    for (int start = 0; start < table.tasks(); start += kTogether) {
      const Bits* sources[kTogether];
      MTLK_UNROLL
      for (int k = 0; k < kTogether; ++k) sources[k] = source<kind>(table, chunk, start + k);
      Vector loaded[kTogether];
      if (vector) {
        MTLK_UNROLL
        for (int k = 0; k < kTogether; ++k) loaded[k] = load_whole<kind>(sources[k], first);
      } else {
        MTLK_UNROLL
        for (int k = 0; k < kTogether; ++k) loaded[k] = load_part<kind>(sources[k], first, chunk.count);
      }
      MTLK_UNROLL
      for (int k = 0; k < kTogether; ++k) {
        if (sources[k] == nullptr) continue;
        const double coefficient = read(coefficients + start + k);
        MTLK_UNROLL
        for (int i = 0; i < kPer; ++i) sums[i] += coefficient * Element<kind>::value(get<kind>(loaded[k], i));
      }
    }
    Vector rounded = {};
    MTLK_UNROLL
    for (int i = 0; i < kPer; ++i) put<kind>(rounded, i, Element<kind>::rounded(sums[i]));
    if (vector) {
      store_whole<kind>(result, first, rounded);
    } else {
      store_part<kind>(result, first, chunk.count, rounded);
    }
  }
}

MTLK_GLOBAL void __launch_bounds__(kThreads) combine_kernel(const CombineArguments arguments) {
  const ParameterTable& table = arguments.table;
  Integer parameter = 0;
  for (Integer index = blockIdx.x; index < arguments.chunks; index += gridDim.x) {
    const Chunk chunk = table.chunk(index, parameter);
    parameter = chunk.parameter;
    const auto combine = [](auto kind, auto&... args) { combine_chunk<decltype(kind)::value>(args...); };
    with_kind(table.kind(parameter), combine, table, chunk, arguments.coefficients);
  }
}

}  // namespace mtlk::cuda
