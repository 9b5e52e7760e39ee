// Builds the kernels' view of a level's norms, slopes and dropout from its tensors.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "level/level_args.h"
#include "level/spec.h"
#include "runtime/memory.h"

namespace mtlk {

// Owns what NormLayers point to.
class NormTables {
 public:
  // What is given must outlive this.
  NormTables(const LevelSpec& spec, const LevelShape& level, const LevelTensors& tensors,
             const std::optional<at::Tensor>& seed);
  NormTables(const NormTables&) = delete;

  NormLayer* layers() { return layers_.data(); }
  uint64_t seed() const { return seed_; }

  // How many arrays of sums over the rows the layers need: two of norms, one of slopes.
  int64_t partial_arrays() const { return spec_.has_slopes() ? 3 : 2; }

  // The statistics that the forward pass fills: the means of all layers that have a norm, then the variances.
  Tensors make_statistics();

  // The same of a whole level of so many experts, from its forward pass.
  void set_statistics(at::TensorList statistics, int64_t experts);

  // Memory for what readers apply; `backward` adds what the gradients take, dn of even and odd layers included.
  void allocate(bool backward);

 private:
  int64_t width(int64_t l) const { return level_.widths[l + 1]; }
  bool has_norm(int64_t l) const { return layers_[l].norm != kNoNorm; }
  std::vector<int64_t> normalized() const;  // the numbers of the layers that have a norm
  std::vector<int64_t> statistic_sizes(int64_t l, int64_t experts) const;
  void set_seed(const std::optional<at::Tensor>& seed);
  void set_parameters(const Tensors& given, const char* name, bool slopes, std::vector<const void*>& pointers);

  const LevelSpec& spec_;
  const LevelShape& level_;
  const at::ScalarType dtype_, compute_;
  uint64_t seed_ = 0;
  std::vector<NormLayer> layers_;
  Tensors kept_;
  std::vector<const void*> scales_, shifts_, slopes_;
  std::vector<int64_t> slope_strides_;
  std::unique_ptr<Scratch> memory_, gradients_[2];
};

}  // namespace mtlk
