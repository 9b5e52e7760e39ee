// What is static about a level, and the order in which its tensors travel: mtlkernels/ops/level/spec.py in C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "common/dtypes.h"
#include "runtime/api.h"

namespace mtlk {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;
using Tensors = std::vector<at::Tensor>;

// A level's tensors by kind, in the order in which they travel; undefined ones stand for None. Parameters of experts
// are by layer, then expert.
struct LevelTensors {
  Tensors inputs, weights, biases, scales, shifts, slopes;
  Tensors gates, gate_biases;  // logits without biases, or linear layers
  bool linear_gates;
};

// Tensors that hold on to the memory that these have now. Prepared weights, which are known as what they are and which
// nobody writes to, stay.
MTLK_API void hold_memory(LevelTensors& tensors);

// A flag for each kind of tensor.
using Needs = std::array<bool, 8>;

struct ReachedLevel;

// Over how many experts of a whole level what the forward pass saves is stacked: all layers but the last, then the last
// where it is of any, then signs where there are.
struct SavedShape {
  int64_t layers, experts, last_experts;
  bool signs;
  bool panels;  // the last layer lies in panels, see signs_suffice

  int64_t tensors() const { return layers - (last_experts == 0) + signs; }
  // Of a layer's activations.
  std::vector<int64_t> sizes(int64_t layer, int64_t rows, int64_t width) const {
    if (layer + 1 < layers) return {experts, rows, width};
    if (panels) return {last_experts, rows * width};
    return {last_experts, rows, width};
  }
};

// Holds the encoded lists; what describes the level are views of them.
class MTLK_API LevelSpec {
 public:
  // Of the lists that `encoded` gives. Throws a ValueError for any other.
  LevelSpec(std::vector<int64_t> ints, std::vector<double> floats);
  LevelSpec(LevelSpec&&) = default;

  int64_t num_inputs;
  at::IntArrayRef expert_inputs, gate_sizes, activations, norms;
  at::IntArrayRef gate_inputs;  // of linear gates, otherwise empty
  at::IntArrayRef gate_experts;
  at::ArrayRef<double> eps, dice_eps, dropout;
  std::vector<int> numbers;  // the experts' in the level of which this is a part

  // Where that saves the last layer of experts that several gates mix, and signs of the others: an expert's place among
  // the former, or ~place among the latter.
  std::vector<int> last_places;

  int64_t experts() const { return static_cast<int64_t>(expert_inputs.size()); }
  int64_t gates() const { return static_cast<int64_t>(gate_sizes.size()); }
  int64_t layers() const { return static_cast<int64_t>(activations.size()); }
  bool stores_inputs() const;             // the pre-activations of all layers are stored
  bool signs_suffice(Dtype dtype) const;  // for an expert that one gate mixes, see level_args.h
  SavedShape saved_shape(Dtype dtype) const;
  bool has_norms() const;
  bool has_slopes() const;

  std::pair<std::vector<int64_t>, std::vector<double>> encoded() const;

  // The tensors of a call of an operator. Throws a ValueError where there are not as many as there should be.
  LevelTensors split(at::TensorList inputs, const OptionalTensors& parameters, const OptionalTensors& gates) const;
  // The same of all of them in one list, undefined ones standing for None, which has their number.
  LevelTensors split(at::TensorList all) const;

  // The part of the level on which those outputs depend of which `outputs` is true.
  ReachedLevel reached(const std::vector<bool>& outputs) const;

 private:
  std::vector<int64_t> ints_;
  std::vector<double> floats_;
};

// Those of the tensors that have one of the numbers; there may be no tensors at all.
Tensors picked(const Tensors& tensors, const std::vector<int64_t>& numbers);

// A part; the numbers that its streams, experts and gates have in the whole.
struct ReachedLevel {
  LevelSpec spec;
  std::vector<int64_t> inputs, experts, gates;

  // The part's tensors of those of the whole level.
  LevelTensors pick(const LevelTensors& whole) const;
};

}  // namespace mtlk
