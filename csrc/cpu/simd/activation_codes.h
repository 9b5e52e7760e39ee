// The codes of the experts' activations, those of mtlkernels/ops/activations.py.
#pragma once

namespace mtlk {

enum Activation : int {
  kNone = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kGelu = 3,
  kSilu = 4,
  kTanh = 5,
  kSigmoid = 6,
  // With a learned slope; only layerwise levels have them.
  kPrelu = 7,
  kDice = 8,
};

// Whether the derivative needs the activation's input; otherwise it follows from the output.
inline bool from_input(int code) { return code == kGelu || code == kSilu; }

inline bool has_slopes(int code) { return code == kPrelu || code == kDice; }

}  // namespace mtlk
