#include "gemm/weight_forms.h"

#include <algorithm>

#include "runtime/parallel.h"

namespace mtlk {
namespace {

// Whether an engine that wants prepared weights takes this one in its natural form.
bool fits_as_it_is(const EngineTable& engine, const at::Tensor& weight) {
  return engine.natural_outputs != 0 && weight.size(0) % engine.natural_outputs == 0 && weight.stride(1) == 1 &&
         weight.stride(0) > 0;
}

}  // namespace

at::Tensor preparable(const at::Tensor& weight, bool transposed) {
  const at::Tensor plain = weight.stride(1) != 1 && weight.stride(0) != 1 ? weight.contiguous() : weight;
  return transposed ? plain.t() : plain;
}

void prepare_weight(const EngineTable& engine, const at::Tensor& weight, void* memory) {
  engine.prepare(weight.const_data_ptr(), weight.stride(0), weight.stride(1), weight.size(0), weight.size(1), memory);
}

bool all_declared(at::TensorList weights) {
  return std::all_of(weights.begin(), weights.end(),
                     [](const at::Tensor& w) { return KeptWeights::instance().declared(w); });
}

void WeightForms::set_natural(at::TensorList weights) {
  for (const at::Tensor& weight : weights) {
    kept_.push_back(weight.stride(1) == 1 ? weight : weight.contiguous());
    pointers_.push_back(kept_.back().const_data_ptr());
    ld_.push_back(kept_.back().stride(0));
  }
}

void WeightForms::set_to_be_made(at::TensorList weights, const EngineTable& engine) {
  for (const at::Tensor& weight : weights) {
    const bool repeats = weight.stride(1) == 0 && weight.size(1) > 1;
    const at::Tensor& kept = kept_.emplace_back(repeats ? weight.contiguous() : preparable(weight, false));
    pointers_.push_back(kept.const_data_ptr());
    ld_.push_back(kept.stride(0));
    columns_.push_back(fits_as_it_is(engine, kept) ? 0 : std::max<int64_t>(kept.stride(1), 1));
  }
}

void WeightForms::set(at::TensorList weights, const EngineTable& engine, bool transposed) {
  if (engine.form == WeightForm::kNatural) return set_natural(weights);
  if (engine.form == WeightForm::kPrepared) return prepare(weights, engine, transposed);
  std::vector<at::Tensor> wide(weights.size());
  parallel_tasks(at::get_num_threads(), weights.size(),
                 [&](int64_t i) { wide[i] = weights[i].to(at::kFloat).contiguous(); });
  set_natural(wide);
}

void WeightForms::prepare(at::TensorList weights, const EngineTable& engine, bool transposed) {
  std::vector<size_t> numbers;  // of those to be prepared
  std::vector<int64_t> offsets{0};
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& weight = weights[i];
    const bool natural = !transposed && fits_as_it_is(engine, weight);
    pointers_.push_back(natural ? weight.const_data_ptr() : nullptr);
    ld_.push_back(natural ? weight.stride(0) : 0);
    if (natural) continue;
    const bool keeps = keeps_prepared(engine) && !transposed;
    if (const auto memory = keeps ? KeptWeights::instance().prepared(weight, engine) : nullptr) {
      pointers_.back() = (*memory)[0];
      frozen_.push_back(memory);
      continue;
    }
    const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
    numbers.push_back(i);
    offsets.push_back(offsets.back() + engine.prepared_bytes(outputs, inputs));
    kept_.push_back(preparable(weight, transposed));
  }
  if (numbers.empty()) return;
  char* memory = static_cast<char*>(prepared_.emplace(1, offsets.back())[0]);
  for (size_t i = 0; i < numbers.size(); ++i) pointers_[numbers[i]] = memory + offsets[i];
  parallel_tasks(at::get_num_threads(), numbers.size(),
                 [&](int64_t i) { prepare_weight(engine, kept_[i], memory + offsets[i]); });
}

GroupForms::GroupForms(at::TensorList weights, int experts, const EngineTable& engine, bool transposed)
    : experts_(experts), engine_(engine), pointers_(weights.size()), ld_(weights.size()) {
  for (const at::Tensor& weight : weights) weights_.push_back(preparable(weight, transposed));
  for (size_t i = 0; i < weights_.size(); i += experts) {
    offsets_.push_back(bytes_);
    bytes_ += engine.prepared_bytes(weights_[i].size(0), weights_[i].size(1));
  }
}

void GroupForms::prepare(int64_t layer, int expert, char* memory) {
  const size_t i = layer * experts_ + expert;
  prepare_weight(engine_, weights_[i], memory + offsets_[layer]);
  pointers_[i] = memory + offsets_[layer];
}

}  // namespace mtlk
