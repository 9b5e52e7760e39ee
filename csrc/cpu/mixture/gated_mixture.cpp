// The operator gated_mixture on CPUs.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "level/gate_tables.h"
#include "mixture/gated_mixture_args.h"
#include "runtime/kernel_tables.h"
#include "runtime/parallel.h"

namespace mtlk {
namespace {

void check_values(const at::Tensor& experts) {
  check_dense("experts", experts, experts.scalar_type());
  TORCH_CHECK_VALUE(experts.dim() == 3, "mtlkernels: experts must be a tensor [B, E, H], got ", experts.sizes());
}

GatedMixtureArgs make_args(const at::Tensor& experts, at::TensorList logits, GateTables& tables) {
  tables.set_logits(logits, experts.size(0), experts.scalar_type());
  GatedMixtureArgs args{};
  args.rows = experts.size(0);
  args.experts = experts.size(1);
  args.features = experts.size(2);
  args.values = experts.const_data_ptr();
  args.row_stride = experts.stride(0);
  args.expert_stride = experts.stride(1);
  args.gates = tables.gates();
  return args;
}

void run(const GatedMixtureArgs& args, const GatedMixtureKernels& table, decltype(GatedMixtureKernels::forward) f) {
  parallel_rows(args.rows, table.bytes(args),
                [&](int64_t, int64_t first, int64_t last, void* scratch) { f(args, first, last, scratch); });
}

std::vector<at::Tensor> gated_mixture_forward(const at::Tensor& experts, at::TensorList gate_logits,
                                              at::IntArrayRef gate_experts, at::IntArrayRef gate_sizes) {
  check_values(experts);
  const at::Tensor values = with_unit_stride(experts);
  GateTables tables(gate_experts, gate_sizes, experts.size(1));
  GatedMixtureArgs args = make_args(values, gate_logits, tables);
  std::vector<at::Tensor> outputs;
  std::vector<void*> pointers;
  for (size_t k = 0; k < gate_sizes.size(); ++k) {
    outputs.push_back(pooled({args.rows, args.features}, experts.options()));
    pointers.push_back(outputs.back().mutable_data_ptr());
  }
  args.outputs = pointers.data();
  const GatedMixtureKernels& table = kernels_for<GatedMixtureKernels>(dtype_of(experts));
  run(args, table, table.forward);
  return outputs;
}

std::vector<at::Tensor> gated_mixture_backward(at::TensorList grad_outputs, const at::Tensor& experts,
                                               at::TensorList gate_logits, at::IntArrayRef gate_experts,
                                               at::IntArrayRef gate_sizes, bool need_experts, bool need_logits) {
  check_values(experts);
  const at::Tensor values = with_unit_stride(experts);
  GateTables tables(gate_experts, gate_sizes, experts.size(1));
  GatedMixtureArgs args = make_args(values, gate_logits, tables);
  TORCH_CHECK_VALUE(grad_outputs.size() == gate_sizes.size(),
                    "mtlkernels: grad_outputs must hold a tensor for each of ", gate_sizes.size(), " gates, got ",
                    grad_outputs.size());
  std::vector<at::Tensor> kept, found;
  std::vector<const void*> grads;
  std::vector<int64_t> grad_ld;
  std::vector<void*> logit_pointers;
  for (size_t k = 0; k < grad_outputs.size(); ++k) {
    check_dense("grad_outputs", k, grad_outputs[k], experts.scalar_type());
    TORCH_CHECK_VALUE(grad_outputs[k].sizes() == at::IntArrayRef({args.rows, args.features}),
                      "mtlkernels: grad_outputs[", k, "] must have shape [", args.rows, ", ", args.features, "], got ",
                      grad_outputs[k].sizes());
    kept.push_back(with_unit_stride(grad_outputs[k]));
    grads.push_back(kept.back().const_data_ptr());
    grad_ld.push_back(kept.back().stride(0));
  }
  if (need_experts) {
    found.push_back(pooled(experts.sizes(), experts.options()));
    args.grad_values = found.back().mutable_data_ptr();
  }
  for (size_t k = 0; need_logits && k < gate_logits.size(); ++k) {
    found.push_back(at::empty(gate_logits[k].sizes(), gate_logits[k].options()));
    logit_pointers.push_back(found.back().mutable_data_ptr());
  }
  args.grad_outputs = grads.data();
  args.grad_output_ld = grad_ld.data();
  args.grad_logits = need_logits ? logit_pointers.data() : nullptr;
  const GatedMixtureKernels& table = kernels_for<GatedMixtureKernels>(dtype_of(experts));
  run(args, table, table.backward);
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("gated_mixture_forward", TORCH_FN(gated_mixture_forward));
  m.impl("gated_mixture_backward", TORCH_FN(gated_mixture_backward));
}

}  // namespace mtlk
