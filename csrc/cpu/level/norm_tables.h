// Builds the kernels' view of a level's norms and dropout from an operator's arguments.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "level/level_args.h"
#include "level/normalized_args.h"
#include "runtime/memory.h"
#include "simd/activation_codes.h"

namespace mtlk {

// Owns what NormLayers point to.
class NormTables {
 public:
  NormTables(const Level& level, at::ScalarType dtype, at::IntArrayRef norms, at::ArrayRef<double> eps,
             at::ArrayRef<double> dice_eps, at::ArrayRef<double> dropout, const std::optional<at::Tensor>& seed,
             const OptionalTensors& scales, const OptionalTensors& shifts, const OptionalTensors& slopes)
      : level_(level), dtype_(dtype), compute_(dtype == at::kDouble ? at::kDouble : at::kFloat) {
    const auto layers = static_cast<size_t>(level.layers), experts = static_cast<size_t>(level.experts);
    check_count(norms.size(), layers, "norms");
    check_count(eps.size(), layers, "eps");
    check_count(dice_eps.size(), layers, "dice_eps");
    check_count(dropout.size(), layers, "dropout");
    check_count(scales.size(), layers * experts, "scales");
    check_count(shifts.size(), layers * experts, "shifts");
    check_count(slopes.size(), layers * experts, "slopes");
    bool drops = false;
    for (size_t l = 0; l < layers; ++l) {
      TORCH_CHECK_VALUE(norms[l] >= kNoNorm && norms[l] <= kLayerNorm, "mtlkernels: norms[", l,
                        "] must be 0, 1 or 2, got ", norms[l]);
      TORCH_CHECK_VALUE(dropout[l] >= 0 && dropout[l] <= 1, "mtlkernels: dropout[", l, "] must be in [0, 1], got ",
                        dropout[l]);
      drops = drops || dropout[l] > 0;
      NormLayer layer{};
      layer.norm = static_cast<int>(norms[l]);
      layer.eps = eps[l];
      layer.dice_eps = dice_eps[l];
      layer.rate = dropout[l];
      layer.ld = (width(l) + 31) / 32 * 32;
      layers_.push_back(layer);
    }
    if (drops) set_seed(seed);
    set_parameters(scales, "scales", &scales_, &scale_pointers_);
    set_parameters(shifts, "shifts", &shifts_, &shift_pointers_);
    set_parameters(slopes, "slopes", &slopes_, &slope_pointers_);
    for (const at::Tensor& tensor : slopes_) slope_strides_.push_back(tensor.defined() && tensor.size(0) > 1);
    for (size_t l = 0; l < layers; ++l) {
      layers_[l].scales = scale_pointers_.data() + l * experts;
      layers_[l].shifts = shift_pointers_.data() + l * experts;
      layers_[l].activation_slopes = slope_pointers_.data() + l * experts;
      layers_[l].activation_slope_strides = slope_strides_.data() + l * experts;
    }
  }
  NormTables(const NormTables&) = delete;

  NormLayer* layers() { return layers_.data(); }
  uint64_t seed() const { return seed_; }
  bool has_norm(int64_t l) const { return layers_[l].norm != kNoNorm; }
  bool slopes_at(int64_t l) const { return has_slopes(level_.activations[l]); }

  // How many arrays of sums over the rows the layers need: two of norms, one of slopes.
  int64_t partial_arrays() const {
    return std::any_of(level_.activations, level_.activations + level_.layers, has_slopes) ? 3 : 2;
  }

  // The shape of a layer's statistics.
  std::vector<int64_t> statistic_sizes(int64_t l) const {
    return {level_.experts, layers_[l].norm == kBatchNorm ? width(l) : level_.rows};
  }
  at::ScalarType compute() const { return compute_; }

  // One a normalised layer, in their order.
  void set_statistics(at::TensorList means, at::TensorList variances) {
    size_t next = 0;
    for (int l = 0; l < level_.layers; ++l) {
      if (!has_norm(l)) continue;
      TORCH_CHECK_VALUE(next < means.size() && next < variances.size(),
                        "mtlkernels: means and variances must hold a tensor for each normalised layer");
      layers_[l].mean = statistic(means[next], l, "means");
      layers_[l].variance = statistic(variances[next], l, "variances");
      ++next;
    }
    TORCH_CHECK_VALUE(next == means.size() && next == variances.size(),
                      "mtlkernels: means and variances must hold a tensor for each of ", next, " normalised layers");
  }

  // Memory for what readers apply; `backward` adds what the gradients take, dn of even and odd layers included.
  void allocate(bool backward) {
    const int64_t item = compute_ == at::kDouble ? 8 : 4, storage = static_cast<int64_t>(c10::elementSize(dtype_));
    int64_t bytes = 0, gradients[2] = {};
    std::vector<std::pair<void**, int64_t>> pieces;
    const auto piece = [&](void*& pointer, int64_t count) {
      pieces.emplace_back(&pointer, bytes);
      bytes += (level_.experts * count * item + 63) / 64 * 64;
    };
    for (int l = 0; l < level_.layers; ++l) {
      NormLayer& layer = layers_[l];
      const int64_t groups = (level_.rows + 15) / 16;
      gradients[l % 2] = std::max(gradients[l % 2], level_.experts * groups * width(l) * 16 * storage);
      if (slopes_at(l)) piece(layer.activation_slope, layer.ld);
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
    for (auto [pointer, offset] : pieces) *pointer = static_cast<char*>((*memory_)[0]) + offset;
    for (int parity = 0; backward && parity < 2; ++parity) {
      gradients_[parity] = std::make_unique<Scratch>(1, gradients[parity]);
      for (int l = parity; l < level_.layers; l += 2) layers_[l].grad = (*gradients_[parity])[0];
    }
  }

  // Gradients of the scales, shifts and slopes that are there, where they are needed.
  void set_gradients(bool need_norms, bool need_slopes) {
    const auto make = [&](const std::vector<at::Tensor>& tensors, bool need, std::vector<at::Tensor>* grads,
                          std::vector<void*>* pointers) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        const bool wanted = need && tensors[i].defined();
        const int64_t size = width(static_cast<int64_t>(i) / level_.experts);
        grads->push_back(wanted ? at::zeros({size}, tensors[i].options().dtype(compute_)) : at::Tensor());
        pointers->push_back(grads->back().defined() ? grads->back().mutable_data_ptr() : nullptr);
      }
    };
    make(scales_, need_norms, &grad_scales_, &grad_scale_pointers_);
    make(shifts_, need_norms, &grad_shifts_, &grad_shift_pointers_);
    make(slopes_, need_slopes, &grad_slopes_, &grad_slope_pointers_);
    for (int l = 0; l < level_.layers; ++l) {
      layers_[l].grad_scales = grad_scale_pointers_.data() + l * level_.experts;
      layers_[l].grad_shifts = grad_shift_pointers_.data() + l * level_.experts;
      layers_[l].grad_activation_slopes = grad_slope_pointers_.data() + l * level_.experts;
    }
  }
  std::vector<at::Tensor> take_grad_scales() const { return taken(grad_scales_, scales_); }
  std::vector<at::Tensor> take_grad_shifts() const { return taken(grad_shifts_, shifts_); }
  std::vector<at::Tensor> take_grad_slopes() const { return taken(grad_slopes_, slopes_); }

 private:
  int64_t width(int64_t l) const { return level_.widths[l + 1]; }

  static void check_count(size_t count, size_t expected, const char* name) {
    TORCH_CHECK_VALUE(count == expected, "mtlkernels: ", name, " must hold ", expected, " entries, got ", count);
  }

  void set_seed(const std::optional<at::Tensor>& seed) {
    TORCH_CHECK_VALUE(seed.has_value() && seed->defined(), "mtlkernels: dropout needs a seed");
    check_plain(*seed);
    TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "mtlkernels: seed must be an int64 tensor, got ",
                     seed->scalar_type());
    TORCH_CHECK_VALUE(seed->is_cpu() && seed->numel() == 1, "mtlkernels: seed must hold one element on the CPU, got ",
                      seed->sizes(), " on ", seed->device());
    seed_ = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }

  void set_parameters(const OptionalTensors& given, const char* name, std::vector<at::Tensor>* tensors,
                      std::vector<const void*>* pointers) {
    const bool slopes = tensors == &slopes_;
    for (size_t i = 0; i < given.size(); ++i) {
      const at::Tensor tensor = given.get(i).value_or(at::Tensor());
      const auto l = static_cast<int64_t>(i) / level_.experts;
      tensors->push_back(tensor);
      pointers->push_back(nullptr);
      if (!tensor.defined()) continue;
      check_plain(tensor);
      TORCH_CHECK_VALUE(slopes ? slopes_at(l) : has_norm(l), "mtlkernels: ", name, "[", i,
                        "] must be None, as its layer has ", slopes ? "an activation without slopes" : "no norm");
      TORCH_CHECK_TYPE(tensor.scalar_type() == dtype_ || tensor.scalar_type() == compute_, "mtlkernels: ", name, "[", i,
                       "] must be of ", dtype_, " or ", compute_, ", got ", tensor.scalar_type());
      const bool fits = tensor.dim() == 1 && (tensor.size(0) == width(l) || (slopes && tensor.size(0) == 1));
      TORCH_CHECK_VALUE(fits, "mtlkernels: ", name, "[", i, "] must have shape [", width(l), "]",
                        slopes ? " or [1]" : "", ", got ", tensor.sizes());
      TORCH_CHECK_VALUE(tensor.is_cpu(), "mtlkernels: ", name, "[", i, "] must be on the CPU, got ", tensor.device());
      kept_.push_back(tensor.to(compute_).contiguous());
      pointers->back() = kept_.back().const_data_ptr();
    }
  }

  void* statistic(const at::Tensor& tensor, int64_t l, const char* name) {
    check_plain(tensor);
    TORCH_CHECK_TYPE(tensor.scalar_type() == compute_, "mtlkernels: ", name, " must be of ", compute_, ", got ",
                     tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.sizes() == at::IntArrayRef(statistic_sizes(l)), "mtlkernels: ", name,
                      " of layer ", l, " must have shape ", at::IntArrayRef(statistic_sizes(l)), " on the CPU, got ",
                      tensor.sizes(), " on ", tensor.device());
    kept_.push_back(tensor.contiguous());
    return const_cast<void*>(kept_.back().const_data_ptr());  // the backward pass only reads it
  }

  static std::vector<at::Tensor> taken(const std::vector<at::Tensor>& grads, const std::vector<at::Tensor>& like) {
    std::vector<at::Tensor> result;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      const bool whole = grads[i].sizes() == like[i].sizes();  // otherwise one slope serves all channels
      result.push_back((whole ? grads[i] : grads[i].sum().view(1)).to(like[i].scalar_type()));
    }
    return result;
  }

  const Level& level_;
  const at::ScalarType dtype_, compute_;
  uint64_t seed_ = 0;
  std::vector<NormLayer> layers_;
  std::vector<at::Tensor> scales_, shifts_, slopes_, grad_scales_, grad_shifts_, grad_slopes_, kept_;
  std::vector<const void*> scale_pointers_, shift_pointers_, slope_pointers_;
  std::vector<int64_t> slope_strides_;
  std::vector<void*> grad_scale_pointers_, grad_shift_pointers_, grad_slope_pointers_;
  std::unique_ptr<Scratch> memory_, gradients_[2];
};

}  // namespace mtlk
