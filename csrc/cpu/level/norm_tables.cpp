#include "level/norm_tables.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "level/gate_tables.h"
#include "runtime/check.h"
#include "simd/activation_codes.h"

namespace mtlk {

NormTables::NormTables(const LevelSpec& spec, const LevelShape& level, const LevelTensors& tensors,
                       const std::optional<at::Tensor>& seed)
    : spec_(spec),
      level_(level),
      dtype_(tensors.inputs[0].scalar_type()),
      compute_(dtype_ == at::kDouble ? at::kDouble : at::kFloat) {
  for (int64_t l = 0; l < level.layers; ++l) {
    NormLayer& layer = layers_.emplace_back();
    layer.norm = static_cast<int>(spec.norms[l]);
    layer.eps = spec.eps[l];
    layer.dice_eps = spec.dice_eps[l];
    layer.rate = spec.dropout[l];
    layer.ld = (width(l) + 31) / 32 * 32;
  }
  if (std::any_of(spec.dropout.begin(), spec.dropout.end(), [](double rate) { return rate > 0; })) set_seed(seed);
  set_parameters(tensors.scales, "scales", false, scales_);
  set_parameters(tensors.shifts, "shifts", false, shifts_);
  set_parameters(tensors.slopes, "slopes", true, slopes_);
  for (int64_t l = 0; l < level.layers; ++l) {
    layers_[l].scales = scales_.data() + l * level.experts;
    layers_[l].shifts = shifts_.data() + l * level.experts;
    layers_[l].activation_slopes = slopes_.data() + l * level.experts;
    layers_[l].activation_slope_strides = slope_strides_.data() + l * level.experts;
  }
}

std::vector<int64_t> NormTables::normalized() const {
  std::vector<int64_t> numbers;
  for (int64_t l = 0; l < level_.layers; ++l) {
    if (has_norm(l)) numbers.push_back(l);
  }
  return numbers;
}

std::vector<int64_t> NormTables::statistic_sizes(int64_t l, int64_t experts) const {
  return {experts, layers_[l].norm == kBatchNorm ? width(l) : level_.rows};
}

Tensors NormTables::make_statistics() {
  Tensors statistics;
  for (void* NormLayer::* which : {&NormLayer::mean, &NormLayer::variance}) {
    for (const int64_t l : normalized()) {
      statistics.push_back(at::empty(statistic_sizes(l, level_.experts), at::device(at::kCPU).dtype(compute_)));
      layers_[l].*which = statistics.back().mutable_data_ptr();
    }
  }
  return statistics;
}

void NormTables::set_statistics(at::TensorList statistics, int64_t experts) {
  const std::vector<int64_t> numbers = normalized();
  MTLK_CHECK_VALUE(statistics.size() == 2 * numbers.size(), "saved must hold means and variances of ", numbers.size(),
                   " layers, got ", statistics.size(), " tensors");
  size_t next = 0;
  for (void* NormLayer::* which : {&NormLayer::mean, &NormLayer::variance}) {
    for (const int64_t l : numbers) {
      const at::Tensor& tensor = statistics[next++];
      const std::vector<int64_t> sizes = statistic_sizes(l, experts);
      check_dense("statistics", l, tensor, compute_);
      MTLK_CHECK_VALUE(tensor.sizes() == at::IntArrayRef(sizes), "statistics[", l, "] must have shape ",
                       at::IntArrayRef(sizes), ", got ", tensor.sizes());
      kept_.push_back(tensor.contiguous());
      layers_[l].*which = const_cast<void*>(kept_.back().const_data_ptr());  // the backward pass only reads it
    }
  }
}

void NormTables::allocate(bool backward) {
  const int64_t item = compute_ == at::kDouble ? 8 : 4, storage = static_cast<int64_t>(c10::elementSize(dtype_));
  int64_t bytes = 0, gradients[2] = {};
  struct Place {
    void** pointer;
    int64_t offset, bytes;
  };
  std::vector<Place> pieces;
  const auto piece = [&](void*& pointer, int64_t count) {
    pieces.push_back({&pointer, bytes, level_.experts * count * item});
    bytes += padded(pieces.back().bytes);
  };
  for (int l = 0; l < level_.layers; ++l) {
    NormLayer& layer = layers_[l];
    const int64_t groups = (level_.rows + 15) / 16;
    gradients[l % 2] = std::max(gradients[l % 2], level_.experts * groups * width(l) * 16 * storage);
    if (has_slopes(level_.activations[l])) piece(layer.activation_slope, layer.ld);
    if (level_.activations[l] == kDice && backward) {
      piece(layer.gate_mean, level_.rows);
      piece(layer.gate_rate, level_.rows);
    }
    if (!has_norm(l)) continue;
    piece(layer.factor, layer.ld);
    piece(layer.shift, layer.ld);
    if (layer.norm == kBatchNorm) {
      piece(layer.center, layer.ld);
      if (backward) {
        piece(layer.grad_slope, layer.ld);
        piece(layer.grad_offset, layer.ld);
      }
    } else {
      piece(layer.rstd, level_.rows);
      if (backward) {
        piece(layer.row_mean, level_.rows);
        piece(layer.row_slope, level_.rows);
      }
    }
  }
  memory_ = std::make_unique<Scratch>(1, bytes);
  for (const Place& place : pieces) {
    *place.pointer = static_cast<char*>((*memory_)[0]) + place.offset;
    fence(*place.pointer, place.bytes);
  }
  for (int parity = 0; backward && parity < 2; ++parity) {
    gradients_[parity] = std::make_unique<Scratch>(1, gradients[parity]);
    for (int l = parity; l < level_.layers; l += 2) layers_[l].grad = (*gradients_[parity])[0];
  }
}

void NormTables::set_seed(const std::optional<at::Tensor>& seed) {
  MTLK_CHECK_VALUE(seed.has_value() && seed->defined(), "dropout needs a seed");
  check_dense("seed", *seed, at::kLong);
  MTLK_CHECK_VALUE(seed->numel() == 1, "seed must hold one element, got ", seed->sizes());
  seed_ = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

void NormTables::set_parameters(const Tensors& given, const char* name, bool slopes,
                                std::vector<const void*>& pointers) {
  const size_t count = static_cast<size_t>(level_.layers) * level_.experts;
  MTLK_CHECK_VALUE(given.empty() || given.size() == count, name, " must hold ", count, " entries, got ", given.size());
  pointers.resize(count);
  if (slopes) slope_strides_.resize(count);
  for (size_t i = 0; i < given.size(); ++i) {
    const at::Tensor& tensor = given[i];
    const auto l = static_cast<int64_t>(i) / level_.experts;
    if (!tensor.defined()) continue;
    MTLK_CHECK_VALUE(slopes ? mtlk::has_slopes(level_.activations[l]) : has_norm(l), name, "[", i,
                     "] must be None, as its layer has ", slopes ? "an activation without slopes" : "no norm");
    check_dense(name, i, tensor, tensor.scalar_type() == compute_ ? compute_ : dtype_);
    const bool fits = tensor.dim() == 1 && (tensor.size(0) == width(l) || (slopes && tensor.size(0) == 1));
    MTLK_CHECK_VALUE(fits, name, "[", i, "] must have shape [", width(l), "]", slopes ? " or [1]" : "", ", got ",
                     tensor.sizes());
    kept_.push_back(tensor.to(compute_).contiguous());
    pointers[i] = kept_.back().const_data_ptr();
    if (slopes) slope_strides_[i] = tensor.size(0) > 1;
  }
}

}  // namespace mtlk
