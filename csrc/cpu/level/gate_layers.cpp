#include "level/gate_layers.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>

#include "runtime/memory.h"
#include "runtime/parallel.h"

namespace mtlk {
namespace {

// Those of the gates of one stream.
void run(GateGradientArgs& args, const GateKernels& kernels) {
  constexpr int64_t kRows = 1024;  // of a task
  const int64_t threads = at::get_num_threads(), spans = divide_up(args.width, kernels.features);
  const Scratch joined(1, args.rows * kernels.joined_bytes(args.columns));
  const Scratch scratch(threads, kernels.gradient_bytes(args.columns));
  args.joined = joined[0];
  parallel_tasks(threads, divide_up(args.rows, kRows),
                 [&](int64_t task) { kernels.join(args, task * kRows, std::min(kRows, args.rows - task * kRows)); });
  const int64_t made = args.grad_input || args.grad_weights ? spans : 0;
  parallel_tasks_on(threads, made + (args.grad_biases != nullptr), [&](int64_t task, int64_t thread) {
    task < made ? kernels.gradient(args, task * kernels.features, scratch[thread]) : kernels.biases(args);
  });
}

// The address of each row of a matrix that begins at `first`, which may be const.
template <typename Address>
void add_rows(Address first, const at::Tensor& matrix, std::vector<Address>& rows) {
  using Byte = std::conditional_t<std::is_same_v<Address, void*>, char, const char>;
  for (int64_t r = 0; r < matrix.size(0); ++r) {
    rows.push_back(static_cast<Byte*>(first) + r * matrix.stride(0) * matrix.element_size());
  }
}

}  // namespace

GateGradients gate_gradients(const LevelTensors& level, const std::vector<int>& streams, const Tensors& grad_logits,
                             const Tensors& grad_inputs, bool need_weights, bool need_biases,
                             const GateKernels& kernels) {
  const size_t count = level.gates.size();
  GateGradients result;
  for (size_t k = 0; k < count; ++k) {
    const at::Tensor &weight = level.gates[k], &bias = level.gate_biases[k];
    if (need_weights) result.weights.push_back(at::empty(weight.sizes(), weight.options()));
    if (need_biases) result.biases.push_back(bias.defined() ? at::empty(bias.sizes(), bias.options()) : at::Tensor());
  }
  for (int stream = 0; stream < static_cast<int>(level.inputs.size()); ++stream) {
    Tensors kept;
    std::vector<int> sizes;
    std::vector<const void*> logits, weights;
    std::vector<void*> grad_weights, grad_biases;
    for (size_t k = 0; k < count; ++k) {
      if (streams[k] != stream) continue;
      kept.push_back(with_unit_stride(level.gates[k]));
      add_rows(kept.back().const_data_ptr(), kept.back(), weights);
      sizes.push_back(static_cast<int>(kept.back().size(0)));
      logits.push_back(grad_logits[k].const_data_ptr());
      if (need_weights) add_rows(result.weights[k].mutable_data_ptr(), result.weights[k], grad_weights);
      for (int64_t c = 0; need_biases && c < sizes.back(); ++c) {
        const at::Tensor& bias = result.biases[k];
        grad_biases.push_back(bias.defined() ? static_cast<char*>(bias.mutable_data_ptr()) + c * bias.element_size()
                                             : nullptr);
      }
    }
    if (sizes.empty()) continue;
    const at::Tensor x = with_unit_stride(level.inputs[stream]);
    GateGradientArgs args{};
    args.rows = x.size(0);
    args.width = x.size(1);
    args.gates = static_cast<int>(sizes.size());
    args.columns = static_cast<int>(weights.size());
    args.sizes = sizes.data();
    args.grad_logits = logits.data();
    args.input = x.const_data_ptr();
    args.input_ld = x.stride(0);
    args.weights = weights.data();
    args.grad_input = grad_inputs.empty() ? nullptr : grad_inputs[stream].mutable_data_ptr();
    args.grad_weights = need_weights ? grad_weights.data() : nullptr;
    args.grad_biases = need_biases ? grad_biases.data() : nullptr;
    run(args, kernels);
  }
  return result;
}

}  // namespace mtlk
