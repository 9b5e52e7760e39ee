// From the gradients of gates' outputs to those of an expert's outputs.
#pragma once

#include "level/level_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// Of one group of rows, in panels.
template <typename C>
struct Weighing {
  const C* outputs;       // the expert's, [feature][16]
  const C* grad_outputs;  // of each gate, `gate_stride` apart
  int64_t gate_stride;
  const C* probabilities;  // [column][16]
  C* inner;                // [column][16]: <dy, output>
  C* whole;                // [feature][16]: the sum of the gates' dy by their probabilities
  int64_t features;

  // Of so many gates; `fresh`: the first of them.
  template <int Uses>
  void run(const GateUse* use, bool fresh) const {
    constexpr int L = Simd<C>::lanes;
    constexpr int kSums = 4;  // of each inner product, so that none waits for the one before
    for (int j = 0; j < kGroup; j += L) {
      const C* grad[Uses];
      Vector<C> p[Uses], sum[Uses][kSums] = {};
      for (int u = 0; u < Uses; ++u) {
        grad[u] = grad_outputs + use[u].gate * gate_stride + j;
        p[u] = load(probabilities + use[u].column * kGroup + j);
      }
      const auto step = [&](int64_t i, int k) {
        const int64_t at = i * kGroup;
        const Vector<C> out = load(outputs + at + j);
        Vector<C> sum_of_gates = fresh ? Vector<C>{} : load(whole + at + j);
#pragma GCC unroll 2
        for (int u = 0; u < Uses; ++u) {
          const Vector<C> dy = load(grad[u] + at);
          sum_of_gates += p[u] * dy;
          sum[u][k] += dy * out;
        }
        store(whole + at + j, sum_of_gates);
      };
      int64_t i = 0;
      for (; i + kSums <= features; i += kSums) {
#pragma GCC unroll 4
        for (int k = 0; k < kSums; ++k) step(i + k, k);
      }
      for (; i < features; ++i) step(i, 0);
      for (int u = 0; u < Uses; ++u) {
        store(inner + use[u].column * kGroup + j, (sum[u][0] + sum[u][1]) + (sum[u][2] + sum[u][3]));
      }
    }
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
