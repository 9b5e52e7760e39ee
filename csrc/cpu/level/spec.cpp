#include "level/spec.h"

#include <ATen/core/List.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>

#include "gemm/weight_forms.h"
#include "level/level_args.h"
#include "runtime/check.h"
#include "runtime/tensors.h"
#include "simd/activation_codes.h"

namespace mtlk {
namespace {

constexpr size_t kCounts = 5;  // streams, experts, gates, layers, and whether gates are linear

#define MTLK_CHECK_SPEC(holds, ...) MTLK_CHECK_VALUE(holds, "spec must ", __VA_ARGS__)

bool within(at::IntArrayRef values, int64_t end) {
  return std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= 0 && value < end; });
}

// Ints as a spec holds them, from the number of streams and the runs expert_inputs, gate_sizes, activations, norms,
// gate_inputs and gate_experts.
std::vector<int64_t> joined(int64_t num_inputs, std::initializer_list<at::IntArrayRef> runs) {
  const auto size = [&](int run) { return static_cast<int64_t>(runs.begin()[run].size()); };
  std::vector<int64_t> ints{num_inputs, size(0), size(1), size(2), size(4) > 0};
  for (const at::IntArrayRef run : runs) ints.insert(ints.end(), run.begin(), run.end());
  return ints;
}

}  // namespace

Tensors picked(const Tensors& tensors, const std::vector<int64_t>& numbers) {
  Tensors result;
  if (tensors.empty()) return result;
  for (const int64_t number : numbers) result.push_back(tensors[number]);
  return result;
}

LevelSpec::LevelSpec(std::vector<int64_t> ints, std::vector<double> floats)
    : ints_(std::move(ints)), floats_(std::move(floats)) {
  const auto size = static_cast<int64_t>(ints_.size());
  MTLK_CHECK_SPEC(ints_.size() >= kCounts && *std::min_element(ints_.begin(), ints_.end()) >= 0,
                  "begin with four counts and a flag");
  num_inputs = ints_[0];
  const int64_t num_experts = ints_[1], num_gates = ints_[2], num_layers = ints_[3], linear = ints_[4];
  const bool fit = std::max({num_experts, num_gates, num_layers}) <= size && linear < 2;
  MTLK_CHECK_SPEC(fit && 5 + num_experts + num_gates * (1 + linear) + 2 * num_layers <= size,
                  "be as long as its counts say");
  at::IntArrayRef rest = at::IntArrayRef(ints_).slice(kCounts);
  const auto run = [&](int64_t count) {
    const at::IntArrayRef first = rest.slice(0, count);
    rest = rest.slice(count);
    return first;
  };
  expert_inputs = run(num_experts);
  gate_sizes = run(num_gates);
  activations = run(num_layers);
  norms = run(num_layers);
  gate_inputs = run(linear ? num_gates : 0);
  gate_experts = rest;
  MTLK_CHECK_SPEC(floats_.empty() || static_cast<int64_t>(floats_.size()) == 3 * num_layers, "come with ",
                  3 * num_layers, " floats");
  floats_.resize(3 * num_layers);
  const at::ArrayRef<double> all(floats_);
  eps = all.slice(0, num_layers);
  dice_eps = all.slice(num_layers, num_layers);
  dropout = all.slice(2 * num_layers);
  MTLK_CHECK_SPEC(
      std::min({num_experts, num_gates, num_layers}) > 0 && *std::min_element(gate_sizes.begin(), gate_sizes.end()) > 0,
      "hold an expert, a layer and full gates");
  int64_t columns = 0;
  for (const int64_t of_gate : gate_sizes) columns = std::min(columns + std::min(of_gate, size), size);
  MTLK_CHECK_SPEC(columns == static_cast<int64_t>(gate_experts.size()), "name an expert for each of its gates' logits");
  MTLK_CHECK_SPEC(within(gate_experts, num_experts), "name experts in [0, ", num_experts, ")");
  MTLK_CHECK_SPEC(within(expert_inputs, num_inputs) && within(gate_inputs, num_inputs), "name streams that there are");
  for (int64_t l = 0; l < num_layers; ++l) {
    MTLK_CHECK_SPEC(activations[l] <= kDice, "hold codes of activations, not ", activations[l]);
    MTLK_CHECK_SPEC(norms[l] <= kLayerNorm, "hold codes of norms, not ", norms[l]);
    MTLK_CHECK_SPEC(dropout[l] >= 0 && dropout[l] <= 1, "hold rates of dropout in [0, 1], not ", dropout[l]);
  }
  MTLK_CHECK_SPEC(!(linear && stores_inputs()), "take the logits of a level with norms, dropout or slopes");
  numbers.resize(num_experts);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::vector<int> uses(num_experts);
  for (const int64_t e : gate_experts) ++uses[e];
  int several = 0, others = 0;
  for (const int count : uses) last_places.push_back(count > 1 ? several++ : ~others++);
}

bool LevelSpec::has_norms() const {
  return std::any_of(norms.begin(), norms.end(), [](int64_t norm) { return norm != kNoNorm; });
}

bool LevelSpec::has_slopes() const {
  return std::any_of(activations.begin(), activations.end(), [](int64_t code) { return mtlk::has_slopes(code); });
}

bool LevelSpec::signs_suffice(Dtype dtype) const {
  return !stores_inputs() && mtlk::signs_suffice(layers(), activations.data(), dtype);
}

SavedShape LevelSpec::saved_shape(Dtype dtype) const {
  const bool panels = !stores_inputs();
  if (!signs_suffice(dtype)) return {layers(), experts(), experts(), false, panels};
  const int64_t last = std::count_if(last_places.begin(), last_places.end(), [](int place) { return place >= 0; });
  return {layers(), experts(), last, last < experts() && activations.back() == kRelu, panels};
}

bool LevelSpec::stores_inputs() const {
  return has_norms() || has_slopes() ||
         std::any_of(dropout.begin(), dropout.end(), [](double rate) { return rate > 0; });
}

std::pair<std::vector<int64_t>, std::vector<double>> LevelSpec::encoded() const {
  std::vector<double> floats;
  for (const at::ArrayRef<double> run : {eps, dice_eps, dropout}) floats.insert(floats.end(), run.begin(), run.end());
  if (std::all_of(floats.begin(), floats.end(), [](double value) { return value == 0; })) floats.clear();
  return {joined(num_inputs, {expert_inputs, gate_sizes, activations, norms, gate_inputs, gate_experts}), floats};
}

void hold_memory(LevelTensors& tensors) {
  for (Tensors* of_kind : {&tensors.inputs, &tensors.weights, &tensors.biases, &tensors.scales, &tensors.shifts,
                           &tensors.slopes, &tensors.gates, &tensors.gate_biases}) {
    if (of_kind == &tensors.weights && all_declared(tensors.weights)) continue;
    for (at::Tensor& tensor : *of_kind) tensor = held(tensor);
  }
}

LevelTensors LevelSpec::split(at::TensorList inputs, const OptionalTensors& parameters,
                              const OptionalTensors& gates) const {
  const size_t each = experts() * layers(), of_norms = has_norms() ? each : 0, of_slopes = has_slopes() ? each : 0;
  const size_t count = 2 * each + 2 * of_norms + of_slopes, of_gates = gate_sizes.size() + gate_inputs.size();
  MTLK_CHECK_VALUE(static_cast<int64_t>(inputs.size()) == num_inputs, "inputs must hold ", num_inputs, " tensors, got ",
                   inputs.size());
  MTLK_CHECK_VALUE(parameters.size() == count, "parameters must hold ", count, " entries, got ", parameters.size());
  MTLK_CHECK_VALUE(gates.size() == of_gates, "gates must hold ", of_gates, " entries, got ", gates.size());
  Tensors all = inputs.vec();
  for (const OptionalTensors* list : {&parameters, &gates}) {
    for (size_t i = 0; i < list->size(); ++i) all.push_back(resolved(list->get(i).value_or(at::Tensor())));
  }
  LevelTensors tensors = split(all);
  hold_memory(tensors);
  return tensors;
}

LevelTensors LevelSpec::split(at::TensorList all) const {
  const size_t each = experts() * layers(), of_norms = has_norms() ? each : 0, of_slopes = has_slopes() ? each : 0;
  size_t at = 0;
  const auto taken = [&](size_t count) {
    at += count;
    return all.slice(at - count, count).vec();
  };
  LevelTensors result{};
  result.inputs = taken(num_inputs);
  result.weights = taken(each);
  result.biases = taken(each);
  result.scales = taken(of_norms);
  result.shifts = taken(of_norms);
  result.slopes = taken(of_slopes);
  result.gates = taken(gate_sizes.size());
  result.gate_biases = taken(gate_inputs.size());
  result.linear_gates = !gate_inputs.empty();
  return result;
}

ReachedLevel LevelSpec::reached(const std::vector<bool>& outputs) const {
  std::vector<int64_t> streams, live, used, live_streams, sizes, members, gate_streams;
  std::vector<int64_t> place(experts(), -1);  // of an expert in the part
  int64_t column = 0;
  for (int64_t k = 0; k < gates(); column += gate_sizes[k++]) {
    if (!outputs[k]) continue;
    used.push_back(k);
    sizes.push_back(gate_sizes[k]);
    for (const int64_t e : gate_experts.slice(column, gate_sizes[k])) members.push_back(e), place[e] = 0;
    if (!gate_inputs.empty()) gate_streams.push_back(gate_inputs[k]);
  }
  std::vector<int> part_numbers, part_places;
  for (int64_t e = 0; e < experts(); ++e) {
    if (place[e] < 0) continue;
    place[e] = static_cast<int64_t>(live.size());
    live.push_back(e);
    live_streams.push_back(expert_inputs[e]);
    part_numbers.push_back(numbers[e]);
    part_places.push_back(last_places[e]);
  }
  for (const auto& read : {live_streams, gate_streams}) streams.insert(streams.end(), read.begin(), read.end());
  std::sort(streams.begin(), streams.end());
  streams.erase(std::unique(streams.begin(), streams.end()), streams.end());
  for (auto* read : {&live_streams, &gate_streams}) {
    for (int64_t& stream : *read) {
      stream = std::lower_bound(streams.begin(), streams.end(), stream) - streams.begin();
    }
  }
  for (int64_t& e : members) e = place[e];
  const auto count = static_cast<int64_t>(streams.size());
  LevelSpec part(joined(count, {live_streams, sizes, activations, norms, gate_streams, members}), floats_);
  part.numbers = std::move(part_numbers);
  part.last_places = std::move(part_places);
  return {std::move(part), std::move(streams), std::move(live), std::move(used)};
}

LevelTensors ReachedLevel::pick(const LevelTensors& whole) const {
  const int64_t all = static_cast<int64_t>(whole.weights.size()) / spec.layers();
  std::vector<int64_t> at;  // of the experts' parameters
  for (int64_t l = 0; l < spec.layers(); ++l) {
    for (const int64_t e : experts) at.push_back(l * all + e);
  }
  return {picked(whole.inputs, inputs), picked(whole.weights, at),        picked(whole.biases, at),
          picked(whole.scales, at),     picked(whole.shifts, at),         picked(whole.slopes, at),
          picked(whole.gates, gates),   picked(whole.gate_biases, gates), whole.linear_gates};
}

}  // namespace mtlk
