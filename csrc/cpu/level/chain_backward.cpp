// How a backward call of a chain is cut into chunks of rows, groups of experts, blocks of rows and parts of experts.

#include <algorithm>
#include <optional>
#include <vector>

#include "level/blocking.h"
#include "level/chain.h"
#include "level/losses_in_common.h"
#include "runtime/parallel.h"

namespace mtlk {
namespace {

// The experts of a chunk go in groups, one after another, so that what lies between the chain and the weights'
// gradients is of one group only. All threads work on a group; or, where the rows are few, each is a lane of its own,
// which takes its share of the experts one by one and waits for nobody.
struct BackwardPlan {
  int64_t capacity, block_rows, blocks;  // of a full chunk
  int lanes, group;                      // experts of a group
  int parts;                             // of a group, where there are fewer blocks than threads
  bool sums;                             // the inputs' gradients are sums of what several parts or groups leave
  bool keeps_gates;                      // from one group to the next: takes no more memory, or many rows hide it

  static BackwardPlan of(const ChainBackwardArgs& args, const ChainKernels& kernels) {
    constexpr int64_t kTasks = 8;  // of a thread: with fewer, it waits too long for the others
    const LevelShape& level = args.level;
    const int64_t threads = at::get_num_threads(), experts = level.experts;
    BackwardPlan plan{};
    plan.capacity = chunk_rows(level, kernels.engine);
    const int64_t bytes =
        kernels.backward_bytes(level, kMinBlockRows) + kernels.backward_gates_bytes(level, kMinBlockRows);
    const int64_t row_bytes = bytes / kMinBlockRows;
    plan.block_rows = std::min(plan.capacity, mtlk::block_rows(plan.capacity, kernels.engine.block_bytes, row_bytes));
    plan.blocks = divide_up(std::min(plan.capacity, level.rows), plan.block_rows);
    const int64_t lanes = std::min(threads, experts);  // one without an expert would leave nothing to add up
    const bool even = divide_up(experts, threads) * threads * 8 <= experts * 9;
    if (!kernels.weight_gradient) {
      plan.lanes = static_cast<int>(lanes);
      plan.group = static_cast<int>(divide_up(experts, plan.lanes));
      plan.parts = 1;
    } else if (level.rows <= kMaxBlockRows && even) {
      plan.lanes = static_cast<int>(lanes);
      plan.group = plan.parts = 1;
    } else {
      BackwardChunk one_expert{};
      one_expert.last = 1;
      const int64_t tasks = kernels.weight_tasks(args, one_expert), waiting = divide_up(threads, plan.blocks);
      // Of a group: with fewer, the outputs' gradients are read too often; but beside few chunks what lies between is a
      // large part of what a step holds.
      const int64_t few = level.rows > 2 * plan.capacity ? 4 : 2;
      const int64_t least = std::max({few, divide_up(kTasks * threads, tasks), waiting});
      plan.lanes = 1;
      plan.group = static_cast<int>(divide_up(experts, divide_up(experts, least)));
      plan.parts = static_cast<int>(std::min<int64_t>(plan.group, waiting));
    }
    plan.sums = plan.lanes * plan.parts > 1 || plan.group < experts;
    plan.keeps_gates = plan.blocks * plan.lanes * plan.parts <= threads || level.rows > 2 * plan.capacity;
    return plan;
  }
};

class BackwardRun {
 public:
  // `forms` prepare what args.level and args.last_weights point to, a group at a time; none where all is ready.
  BackwardRun(const ChainBackwardArgs& args, const ChainKernels& table, const BackwardPlan& plan,
              std::vector<GroupForms*> forms)
      : args_(args),
        level_(args_.level),
        table_(table),
        plan_(plan),
        threads_(at::get_num_threads()),
        forms_(std::move(forms)),
        apart_(table.weight_gradient != nullptr),
        divided_(args.grad_inputs ? divided() : std::vector<int>()),
        scratch_(threads_, std::max(chain_bytes() + (plan.keeps_gates ? 0 : gates_bytes()),
                                    apart_ && args.need_weights ? table.weight_bytes(level_, plan.capacity) : 0)),
        gradients_(plan.lanes,
                   apart_ && args.need_experts ? table.gradient_bytes(level_, plan.capacity, plan.group) : 0),
        operands_(1, apart_ && args.need_weights ? table.operand_bytes(level_, plan.capacity) : 0),
        prepared_(plan.lanes, plan.group * expert_bytes()),
        gates_(plan.keeps_gates ? plan.blocks * plan.lanes * plan.parts : 0, gates_bytes()),
        below_(plan.blocks, plan.sums ? plan.lanes * plan.parts * below_bytes(plan.block_rows) : 0),
        inner_(plan.blocks, plan.sums ? table.backward_inner_bytes(level_, plan.block_rows) : 0) {
    args_.divided = divided_.data();
    args_.divided_count = divided_count();
  }

  void run() const {
    for (int64_t row = 0; row < level_.rows; row += plan_.capacity) {
      const int64_t rows = std::min(plan_.capacity, level_.rows - row);
      const BackwardChunk all{row, rows, plan_.capacity, 0, level_.experts, nullptr, operands_[0]};
      if (plan_.lanes > 1) {
        parallel_tasks(threads_, operands(), [&](int64_t task) { table_.make_operand(args_, all, task); });
      }
      parallel_threads(plan_.lanes, [&](int64_t lane) {
        BackwardChunk chunk = all;
        chunk.gradients = gradients_[lane];
        each_group(lane, [&](int first, int last, bool later) {
          chunk.first = first;
          chunk.last = last;
          prepare(chunk, lane);
          chain(chunk, lane, later);
          weights(chunk, lane);
        });
      });
      if (plan_.sums && plan_.lanes * plan_.parts > 1) {
        parallel_tasks_on(threads_, blocks(all), [&](int64_t block, int64_t thread) { finish(all, block, thread); });
      }
    }
  }

 private:
  int64_t expert_bytes() const {
    int64_t bytes = 0;
    for (const GroupForms* forms : forms_) bytes += forms->bytes();
    return bytes;
  }
  int64_t chain_bytes() const { return table_.backward_bytes(level_, plan_.block_rows); }
  int64_t gates_bytes() const { return table_.backward_gates_bytes(level_, plan_.block_rows); }
  int64_t below_bytes(int64_t nrows) const { return divided_count() * table_.backward_below_bytes(level_, nrows); }

  // What number `part` of a block has; `later`: after its first group.
  BackwardPart memory_of(int64_t block, int64_t part, int64_t nrows, int64_t thread, bool later) const {
    BackwardPart own{};
    own.gates = plan_.keeps_gates ? gates_[block * plan_.lanes * plan_.parts + part]
                                  : static_cast<char*>(scratch_[thread]) + chain_bytes();
    own.made = plan_.keeps_gates && later;
    if (plan_.sums) {
      own.sums = static_cast<char*>(below_[block]) + part * below_bytes(nrows);
      own.inner = inner_[block];
    }
    own.add = later;
    return own;
  }

  // f(first, last, whether the lane had some before) for each group of a lane: experts order[first, last).
  template <typename F>
  void each_group(int64_t lane, F f) const {
    const int begin = part_begin(level_, static_cast<int>(lane), plan_.lanes);
    const int end = part_begin(level_, static_cast<int>(lane) + 1, plan_.lanes);
    for (int first = begin; first < end; first += plan_.group) {
      f(first, std::min(first + plan_.group, end), first > begin);
    }
  }

  // Where part begins among a group's experts.
  int part_of(int first, int last, int part) const { return first + (last - first) * part / plan_.parts; }

  // Number the streams that a group's or a part's bounds divide.
  std::vector<int> divided() const {
    const auto stream = [&](int position) { return level_.expert_inputs[level_.order[position]]; };
    std::vector<int> numbers(stream(level_.experts - 1) + 1, -1);
    int count = 0;
    for (int64_t lane = 0; lane < plan_.lanes; ++lane) {
      each_group(lane, [&](int first, int last, bool) {
        for (int part = 0; part < plan_.parts; ++part) {
          const int at = part_of(first, last, part);
          if (at > 0 && stream(at - 1) == stream(at) && numbers[stream(at)] < 0) numbers[stream(at)] = count++;
        }
      });
    }
    return numbers;
  }
  int divided_count() const { return divided_.empty() ? 0 : 1 + *std::max_element(divided_.begin(), divided_.end()); }

  int64_t blocks(const BackwardChunk& chunk) const { return divide_up(chunk.rows, plan_.block_rows); }
  int64_t row(const BackwardChunk& chunk, int64_t block) const { return chunk.row + block * plan_.block_rows; }
  int64_t rows(const BackwardChunk& chunk, int64_t block) const {
    return std::min(plan_.block_rows, chunk.rows - block * plan_.block_rows);
  }

  // f(task, thread): by all threads, or in turn where this thread is a lane.
  template <typename F>
  void tasks(int64_t lane, int64_t count, F f) const {
    parallel_runs_on(plan_.lanes > 1 ? 1 : threads_, count,
                     [&](int64_t task, int64_t thread) { f(task, lane + thread); });
  }

  void prepare(const BackwardChunk& chunk, int64_t lane) const {
    char* memory = static_cast<char*>(prepared_[lane]);
    for (GroupForms* forms : forms_) {
      tasks(lane, (chunk.last - chunk.first) * forms->layers(), [&](int64_t task, int64_t) {
        const int64_t index = task / forms->layers();
        forms->prepare(task % forms->layers(), level_.order[chunk.first + index], memory + index * forms->bytes());
      });
      memory += plan_.group * forms->bytes();
    }
  }

  int64_t operands() const { return apart_ && args_.need_weights ? table_.operand_tasks(args_) : 0; }

  // Threads wait for each other as seldom as can be: what the weights' gradients read of the streams is made along with
  // the first group's chain, and where a block has no other parts its last group finishes it. Tasks are a block's part
  // for every group, as what a block sums up over its groups should stay in the caches of one thread.
  void chain(const BackwardChunk& chunk, int64_t lane, bool add) const {
    const int64_t made = plan_.lanes == 1 && !add ? operands() : 0;
    const bool finishes = plan_.sums && plan_.lanes * plan_.parts == 1 && chunk.last == level_.experts;
    const int64_t count = blocks(chunk) * plan_.parts;
    tasks(lane, count, [&](int64_t task, int64_t thread) {
      for (int64_t i = made * task / count; i < made * (task + 1) / count; ++i) table_.make_operand(args_, chunk, i);
      const int64_t block = task / plan_.parts, nrows = rows(chunk, block);
      const int part = static_cast<int>(task % plan_.parts);
      const int first = part_of(chunk.first, chunk.last, part), last = part_of(chunk.first, chunk.last, part + 1);
      if (first == last) return;  // of a last group, which is smaller
      table_.backward(args_, chunk, row(chunk, block), nrows, first, last, scratch_[thread],
                      memory_of(block, lane + part, nrows, thread, add));
      if (finishes) finish(chunk, block, thread);
    });
  }

  void weights(const BackwardChunk& chunk, int64_t lane) const {
    if (!apart_ || (!args_.need_weights && !args_.need_biases)) return;
    tasks(lane, table_.weight_tasks(args_, chunk),
          [&](int64_t task, int64_t thread) { table_.weight_gradient(args_, chunk, task, scratch_[thread]); });
  }

  void finish(const BackwardChunk& chunk, int64_t block, int64_t thread) const {
    const int64_t nrows = rows(chunk, block);
    table_.backward_finish(args_, chunk, row(chunk, block), nrows, memory_of(block, 0, nrows, thread, true),
                           plan_.lanes * plan_.parts, scratch_[thread]);
  }

  ChainBackwardArgs args_;
  const LevelShape& level_;
  const ChainKernels& table_;
  const BackwardPlan plan_;
  const int64_t threads_;
  const std::vector<GroupForms*> forms_;
  const bool apart_;  // gradients of weights and biases are made apart from the chain
  const std::vector<int> divided_;
  const Scratch scratch_, gradients_, operands_, prepared_, gates_, below_, inner_;
};

void run(ChainBackwardArgs& args, LevelTables& tables, at::TensorList weights, const ChainKernels& kernels,
         const LossesInCommon* shared) {
  const EngineTable& engine = kernels.engine;
  const BackwardPlan plan = BackwardPlan::of(args, kernels);
  const int experts = args.level.experts;
  const bool again = computes_last_again(args.level);
  if (shared) {
    args.level = tables.level();
    const LossesInCommon::Pointers pointers = shared->point(args);
    return BackwardRun(args, kernels, plan, {}).run();
  }
  std::vector<GroupForms*> used;
  std::optional<GroupForms> all, last;
  if (engine.form == WeightForm::kPrepared && plan.capacity >= args.level.rows) {
    if (args.need_experts) {
      used.push_back(&all.emplace(weights, experts, engine, engine.backward_transposed));
      tables.set_weights(*all);
    }
    if (again) {
      used.push_back(&last.emplace(weights.slice(weights.size() - experts), experts, engine, false));
      args.last_weights = last->pointers();
      args.last_weight_ld = last->ld();
    }
  } else if (args.need_experts || again) {
    tables.set_backward_weights(engine);
    if (again) tables.set_last_weights(engine);
    args.last_weights = tables.last_weights();
    args.last_weight_ld = tables.last_weight_ld();
  }
  args.level = tables.level();
  BackwardRun(args, kernels, plan, used).run();
}

}  // namespace

void chain_backward(const LevelTensors& tensors, LevelTables& tables, const ChainKernels& kernels,
                    LevelGradients& gradients, const LossesInCommon* shared) {
  const LevelShape& level = tables.level();
  if (level.rows == 0) return gradients.zero();
  ChainBackwardArgs args{};
  args.level = level;
  args.grad_outputs = tables.grad_outputs();
  args.grad_output_ld = tables.grad_output_ld();
  args.saved = tables.saved();
  gradients.point(args);
  args.signs = tables.signs();
  args.from_signs =
      args.need_experts && kernels.from_signs(level.layers, level.activations, dtype_of(tensors.inputs[0]));
  if (!args.need_experts && !args.grad_logits) return;
  run(args, tables, tensors.weights, kernels, shared);
}

}  // namespace mtlk
