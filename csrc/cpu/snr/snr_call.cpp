#include "snr/snr_call.h"

#include "runtime/check.h"
#include "runtime/memory.h"
#include "runtime/tensors.h"

namespace mtlk {

SnrMatrices::SnrMatrices(const char* name, at::TensorList tensors, int64_t rows, at::ScalarType dtype) {
  MTLK_CHECK_VALUE(!tensors.empty(), name, " must hold at least one tensor");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& x = tensors[i];
    check_dense(name, i, x, dtype);
    MTLK_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows, name, "[", i, "] must have shape [", rows, ", D], got ",
                     x.sizes());
    kept_.push_back(with_unit_stride(x));
    pointers_.push_back(kept_.back().const_data_ptr());
    ld_.push_back(kept_.back().stride(0));
    widths_.push_back(x.size(1));
  }
}

SnrCoding::SnrCoding(const at::Tensor& z, int64_t inputs, at::ScalarType dtype) {
  check_dense("z", z, z.scalar_type());
  MTLK_CHECK_VALUE(z.dim() == 2 && z.size(0) > 0 && z.size(1) == inputs, "z must be a tensor [I, ", inputs, "], got ",
                   z.sizes());
  dtype_of(z);
  MTLK_CHECK_TYPE(z.scalar_type() != at::kDouble || dtype == at::kDouble, "z must be float32 or narrower beside u in ",
                  dtype);
  values_ = z.to(at::kDouble).contiguous();
  outputs_ = static_cast<int>(z.size(0));
  inputs_ = static_cast<int>(inputs);
}

SnrSums::SnrSums(const SnrCoding& z, bool transposed, const SnrMatrices& in, c10::function_ref<bool(int, int)> kept,
                 const at::Tensor& like, std::vector<int64_t> output_widths)
    : widths_(std::move(output_widths)) {
  const int outputs = transposed ? z.inputs() : z.outputs(), inputs = transposed ? z.outputs() : z.inputs();
  begin_.push_back(0);
  for (int to = 0; to < outputs; ++to) {
    for (int from = 0; from < inputs; ++from) {
      const int i = transposed ? from : to, j = transposed ? to : from;
      if (z.open(i, j) && kept(i, j)) routes_.push_back({to, from, z(i, j), nullptr, 0});
    }
    begin_.push_back(static_cast<int>(routes_.size()));
    outputs_.push_back(pooled({like.size(0), widths_[to]}, like.options()));
    pointers_.push_back(outputs_.back().mutable_data_ptr());
  }
  sum_ = {like.size(0), inputs,           outputs,        in.widths().data(), widths_.data(), in.pointers(),
          in.ld(),      pointers_.data(), routes_.data(), begin_.data(),      transposed};
}

SnrMatrices snr_grad_outputs(at::TensorList grad_outputs, int64_t rows, at::ScalarType dtype,
                             const std::vector<int64_t>& output_widths) {
  MTLK_CHECK_VALUE(grad_outputs.size() == output_widths.size(), "grad_outputs must hold a tensor for each of ",
                   output_widths.size(), " outputs, got ", grad_outputs.size());
  SnrMatrices grads("grad_outputs", grad_outputs, rows, dtype);
  for (int i = 0; i < grads.count(); ++i) {
    MTLK_CHECK_VALUE(grads.widths()[i] == output_widths[i], "grad_outputs[", i, "] must have width ", output_widths[i],
                     ", got ", grads.widths()[i]);
  }
  return grads;
}

}  // namespace mtlk
