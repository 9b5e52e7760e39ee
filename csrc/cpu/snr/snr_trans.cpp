// The operator snr_trans on CPUs: which routes are evaluated, and how a call is cut into blocks and chunks of rows.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "gemm/mean_width.h"
#include "gemm/row_blocks.h"
#include "gemm/weight_forms.h"
#include "runtime/check.h"
#include "runtime/parallel.h"
#include "runtime/tensors.h"
#include "snr/snr_call.h"

namespace mtlk {
namespace {

// The matrix of a route in [I, J, D_out, D_in], without two calls of PyTorch's dispatcher for each.
at::Tensor matrix_of(const at::Tensor& stacked, int i, int j) {
  const at::Tensor matrix = held(stacked);
  const int64_t offset = stacked.storage_offset() + i * stacked.stride(0) + j * stacked.stride(1);
  matrix.unsafeGetTensorImpl()->set_sizes_and_strides(stacked.sizes().slice(2), stacked.strides().slice(2), offset);
  return matrix;
}

// A call's arguments, checked, so that a direct call of an operator cannot read out of bounds. The public function
// checks the same in Python, where messages know the caller's nesting.
class Call {
 public:
  Call(at::TensorList u, at::TensorList weights, const at::Tensor& z)
      : like(first_of(u)),
        rows(like.size(0)),
        in("u", u, rows, like.scalar_type()),
        z(z, in.count(), like.scalar_type()),
        stacked(weights.size() == 1 && weights[0].dim() == 4) {
    const auto count = static_cast<size_t>(this->z.outputs()) * in.count();
    for (size_t r = 0; r < weights.size(); ++r) check_dense("weights", r, weights[r], like.scalar_type());
    if (stacked) {
      MTLK_CHECK_VALUE(weights[0].size(0) == this->z.outputs() && weights[0].size(1) == in.count(),
                       "weights must have shape [", this->z.outputs(), ", ", in.count(), ", D_out, D_in], got ",
                       weights[0].sizes());
      for (int i = 0; i < this->z.outputs(); ++i) {
        for (int j = 0; j < in.count(); ++j) matrices.push_back(matrix_of(weights[0], i, j));
      }
    } else {
      matrices = weights.vec();
    }
    MTLK_CHECK_VALUE(matrices.size() == count, "weights must hold ", count, " matrices, got ", matrices.size());
    for (size_t r = 0; r < count; ++r) {
      const at::Tensor& first = matrices[r / in.count() * in.count()];
      const int64_t out = first.dim() == 2 ? first.size(0) : 0, width = in.widths()[r % in.count()];
      MTLK_CHECK_VALUE(matrices[r].dim() == 2 && matrices[r].size(0) == out && matrices[r].size(1) == width, "weights[",
                       r, "] must have shape [", out, ", ", width, "], got ", matrices[r].sizes());
    }
  }

  std::vector<int64_t> output_widths() const {
    std::vector<int64_t> widths;
    for (int i = 0; i < z.outputs(); ++i) widths.push_back(matrix(i, 0).size(0));
    return widths;
  }
  const at::Tensor& matrix(int i, int j) const { return matrices[static_cast<size_t>(i) * in.count() + j]; }
  const SnrTransKernels& kernels() const {
    MeanWidth width;
    for (const at::Tensor& matrix : matrices) width.add(matrix.size(1), matrix.size(0));
    return kernels_for<SnrTransKernels>(dtype_of(like), rows, width(), &Pays::call);
  }
  bool has_elements(int i, int j) const { return rows > 0 && matrix(i, j).numel() > 0; }

  const at::Tensor like;
  const int64_t rows;
  const SnrMatrices in;
  const SnrCoding z;
  const bool stacked;
  std::vector<at::Tensor> matrices;

 private:
  static const at::Tensor& first_of(at::TensorList u) {
    MTLK_CHECK_VALUE(!u.empty() && u[0].dim() == 2, "u must hold at least one matrix");
    return u[0];
  }
};

// The inputs of a block are read again for every output, from the second- or third-level cache; its rows share the cost
// of reading all weights.
constexpr int64_t kBlocksOfCache = 4;

// The sums of one direction: outputs from u, or gradients of u from those of the outputs.
std::vector<at::Tensor> run_sums(const Call& call, bool transposed, const SnrMatrices& in) {
  const auto& kernels = call.kernels();
  const auto kept = [&](int i, int j) { return call.has_elements(i, j); };
  SnrSums sums(call.z, transposed, in, kept, call.like, transposed ? call.in.widths() : call.output_widths());
  const SnrSum& sum = sums.sum();
  if (call.rows == 0) return sums.take();
  std::vector<at::Tensor> used;
  for (const SnrRoute& r : sums.routes()) {
    used.push_back(transposed ? call.matrix(r.input, r.output) : call.matrix(r.output, r.input));
  }
  WeightForms weights;
  weights.set(used, kernels.engine, transposed && kernels.engine.backward_transposed);
  for (size_t r = 0; r < used.size(); ++r) {
    sums.routes()[r].weight = weights.pointers()[r];
    sums.routes()[r].weight_ld = weights.ld()[r];
  }
  const int64_t threads = at::get_num_threads();
  const int64_t rows = block_rows(call.rows, kBlocksOfCache * kernels.engine.block_bytes,
                                  kernels.sum_bytes(sum, kMinBlockRows) / kMinBlockRows);
  const int64_t blocks = divide_up(call.rows, rows);
  const int64_t parts = std::min<int64_t>(sum.outputs, divide_up(threads, blocks));
  const int64_t used_threads = std::min(threads, blocks * parts);
  const Scratch scratch(used_threads, kernels.sum_bytes(sum, rows));
  parallel_tasks_on(used_threads, blocks * parts, [&](int64_t task, int64_t thread) {
    const int64_t row = task / parts * rows, part = task % parts;
    kernels.sum(sum, row, std::min(rows, call.rows - row), static_cast<int>(sum.outputs * part / parts),
                static_cast<int>(sum.outputs * (part + 1) / parts), scratch[thread]);
  });
  return sums.take();
}

// The gradients of the weights and of z, from one product a route. Routes whose weight and z both have none are left
// out.
class Products {
 public:
  Products(const Call& call, const SnrMatrices& grads, bool need_weights, bool need_z, bool closed_grad)
      : call_(call), grads_(grads), kernels_(call.kernels()) {
    const bool every = need_z && closed_grad;
    const auto options = call.like.options();
    const auto compute = options.dtype(call.like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    grad_z_ = at::zeros({call.z.outputs(), call.z.inputs()}, at::kDouble);
    if (need_weights && call.stacked) {
      const auto& first = call.matrices[0];
      grad_weights_.push_back(pooled({call.z.outputs(), call.z.inputs(), first.size(0), first.size(1)}, options));
    }
    for (int i = 0; i < call.z.outputs(); ++i) {
      for (int j = 0; j < call.z.inputs(); ++j) {
        const at::Tensor& matrix = call.matrix(i, j);
        const bool open = call.z.open(i, j) && call.has_elements(i, j);
        at::Tensor grad;
        if (need_weights) {
          grad = call.stacked ? matrix_of(grad_weights_[0], i, j) : pooled(matrix.sizes(), options);
          if (!open && grad.numel() > 0) std::memset(grad.mutable_data_ptr(), 0, grad.nbytes());
          if (!call.stacked) grad_weights_.push_back(grad);
        }
        if (!open && !(every && call.has_elements(i, j))) continue;
        const int64_t multiple = kernels_.engine.weight_sum_multiple;
        const int64_t ld = divide_up(matrix.size(1), multiple) * multiple;
        const bool in_place = need_weights && open && kernels_.engine.sums_as_stored && ld == matrix.size(1);
        routes_.push_back({i, j, in_place ? grad : pooled({matrix.size(0), ld}, compute), ld,
                           open ? grad : at::Tensor(), with_unit_stride(matrix)});
      }
    }
  }

  void run() {
    if (routes_.empty()) return;
    const int64_t capacity = chunk_rows();
    std::vector<int64_t> gradient_at{0}, operand_at{0};
    for (int i = 0; i < grads_.count(); ++i) {
      gradient_at.push_back(gradient_at.back() + padded(kernels_.gradient_bytes(grads_.widths()[i], capacity)));
    }
    for (int j = 0; j < call_.in.count(); ++j) {
      operand_at.push_back(operand_at.back() + padded(kernels_.operand_bytes(call_.in.widths()[j], capacity)));
    }
    const Scratch memory(2, std::max(gradient_at.back(), operand_at.back()));
    gradients_ = static_cast<char*>(memory[0]);
    operands_ = static_cast<char*>(memory[1]);
    for (int64_t row = 0; row < call_.rows; row += capacity) {
      chunk(row, std::min(capacity, call_.rows - row), gradient_at, operand_at);
    }
    double* grad_z = grad_z_.mutable_data_ptr<double>();
    parallel_tasks(at::get_num_threads(), routes_.size(), [&](int64_t r) {
      const Route& route = routes_[r];
      grad_z[route.i * call_.z.inputs() + route.j] =
          kernels_.finish(route.sum.const_data_ptr(), route.ld, route.weight.size(0), route.weight.size(1),
                          route.weight.const_data_ptr(), route.weight.stride(0), call_.z(route.i, route.j),
                          route.grad.defined() ? route.grad.mutable_data_ptr() : nullptr);
    });
  }

  std::vector<at::Tensor> take_weights() { return std::move(grad_weights_); }
  const at::Tensor& grad_z() const { return grad_z_; }

 private:
  struct Route {
    int i, j;
    at::Tensor sum;
    int64_t ld;
    at::Tensor grad;  // none for a closed route
    at::Tensor weight;
  };

  // Rows that are multiplied together, in chunks of equal size: the gradients of one output should stay in the
  // second-level cache with what they are multiplied by.
  int64_t chunk_rows() const {
    int64_t widest = 1;
    for (int i = 0; i < grads_.count(); ++i) widest = std::max(widest, grads_.widths()[i]);
    const int64_t fitting = kernels_.engine.chunk_bytes / (widest * kernels_.engine.gradient_bytes_each);
    const int64_t most = std::clamp<int64_t>(fitting, 512, 2048);
    return divide_up(divide_up(call_.rows, divide_up(call_.rows, most)), 32) * 32;
  }

  void chunk(int64_t row, int64_t rows, const std::vector<int64_t>& gradient_at,
             const std::vector<int64_t>& operand_at) const {
    const int64_t threads = at::get_num_threads(), outputs = grads_.count();
    std::vector<bool> reads_gradient(outputs), reads_operand(call_.in.count());
    std::vector<std::pair<size_t, int64_t>> tasks;  // a route, its first column
    for (size_t r = 0; r < routes_.size(); ++r) {
      reads_gradient[routes_[r].i] = reads_operand[routes_[r].j] = true;
      for (int64_t column = 0; column < routes_[r].weight.size(1); column += kernels_.columns) {
        tasks.emplace_back(r, column);
      }
    }
    const auto row_of = [&](const SnrMatrices& from, int64_t i) {
      return static_cast<const char*>(from.pointers()[i]) + row * from.ld()[i] * call_.like.element_size();
    };
    parallel_tasks(threads, outputs + call_.in.count(), [&](int64_t task) {
      const int64_t j = task - outputs;
      if (j < 0 && reads_gradient[task]) {
        kernels_.make_gradient(row_of(grads_, task), grads_.ld()[task], rows, grads_.widths()[task],
                               gradients_ + gradient_at[task]);
      } else if (j >= 0 && reads_operand[j]) {
        kernels_.make_operand(row_of(call_.in, j), call_.in.ld()[j], rows, call_.in.widths()[j],
                              operands_ + operand_at[j]);
      }
    });
    parallel_tasks(threads, tasks.size(), [&](int64_t task) {
      const Route& route = routes_[tasks[task].first];
      const SnrProduct product{rows,
                               gradients_ + gradient_at[route.i],
                               route.weight.size(0),
                               row_of(call_.in, route.j),
                               call_.in.ld()[route.j],
                               operands_ + operand_at[route.j],
                               route.weight.size(1),
                               const_cast<void*>(route.sum.const_data_ptr()),
                               route.ld,
                               row > 0};
      kernels_.product(product, tasks[task].second);
    });
  }

  const Call& call_;
  const SnrMatrices& grads_;
  const SnrTransKernels& kernels_;
  std::vector<Route> routes_;
  std::vector<at::Tensor> grad_weights_;
  at::Tensor grad_z_;
  char *gradients_ = nullptr, *operands_ = nullptr;
};

}  // namespace

std::vector<at::Tensor> snr_trans_forward(at::TensorList u, at::TensorList weights, const at::Tensor& z) {
  const Call call(u, weights, z);
  return run_sums(call, false, call.in);
}

std::vector<at::Tensor> snr_trans_backward(at::TensorList grad_outputs, at::TensorList u, at::TensorList weights,
                                           const at::Tensor& z, bool need_u, bool need_weights, bool need_z,
                                           bool closed_grad) {
  const Call call(u, weights, z);
  const SnrMatrices grads = snr_grad_outputs(grad_outputs, call.rows, call.like.scalar_type(), call.output_widths());
  std::vector<at::Tensor> found;
  if (need_u) found = run_sums(call, true, grads);
  if (need_weights || need_z) {
    Products products(call, grads, need_weights, need_z, closed_grad);
    products.run();
    std::vector<at::Tensor> weights_found = products.take_weights();
    std::move(weights_found.begin(), weights_found.end(), std::back_inserter(found));
    if (need_z) found.push_back(products.grad_z().to(z.scalar_type()));
  }
  return found;
}

TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("snr_trans_forward", TORCH_FN(snr_trans_forward));
  m.impl("snr_trans_backward", TORCH_FN(snr_trans_backward));
}

}  // namespace mtlk
