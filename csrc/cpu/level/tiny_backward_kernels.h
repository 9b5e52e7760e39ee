// The backward pass of a chain for a few rows: sums of the weights' rows, which are read once, and gradients of
// the weights that are written once.
#pragma once

#include "level/chain_backward_kernels.h"
#include "level/tiny_forward_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

// out row o = the sum over the rows r of factor[r][o] * x row r; `row` has room for one, in whole vectors.
template <typename T, typename C, int R>
void outer_products(const C* factor, int64_t ld_factor, int64_t outputs, const C* x, int64_t ldx, int64_t width, C* row,
                    T* out) {
  constexpr int L = Simd<C>::lanes;
  for (int64_t o = 0; o < outputs; ++o) {
    C* place = row;
    if constexpr (__is_same(T, C)) {
      if (width % L == 0) place = out + o * width;
    }
    Vector<C> f[R];
    for (int r = 0; r < R; ++r) f[r] = broadcast(factor[r * ld_factor + o]);
    for (int64_t i = 0; i < width; i += L) {
      Vector<C> sum = f[0] * load(x + i);
#pragma GCC unroll 4
      for (int r = 1; r < R; ++r) sum += f[r] * load(x + r * ldx + i);
      store(place + i, sum);
    }
    if (place == row) narrow(row, out + o * width, width);
  }
}

// All rows of a call, some of its experts. The sums for the weights go straight to the results, of the storage type.
// Rows of intermediates are `widest_` apart; those that are not there are
// zero.
template <typename T>
class TinyBackward {
 public:
  using C = Compute<T>;

  // What the parts leave for finish: each its sums of the inputs' gradients, all of them the inner products of the
  // outputs' gradients with the experts' outputs.
  static int64_t below_size(const LevelShape& level) {
    return stream_count(level) * kTinyRows * padded_to_group(level.widths[0]);
  }
  static int64_t inner_size(const LevelShape& level) { return level.gates.columns * kGroup; }

  static int64_t bytes(const LevelShape& level) {
    const int64_t row = kTinyRows * padded_to_group(widest_of(level));
    return Arena::bytes<C>(level.gates.count * kTinyRows * padded_to_group(level.widths[level.layers])) +
           Arena::bytes<C>(level.gates.columns * kGroup) + 4 * Arena::bytes<C>(row) +
           Arena::bytes<C>(padded_to_group(widest_of(level)));
  }

  TinyBackward(const ChainBackwardArgs& args, void* memory)
      : args_(args),
        level_(args.level),
        rows_(args.level.rows),
        features_(args.level.widths[args.level.layers]),
        widest_(padded_to_group(widest_of(args.level))) {
    Arena arena(memory);
    grad_outputs_ = arena.take<C>(level_.gates.count * kTinyRows * padded_to_group(features_));
    probabilities_ = arena.take<C>(level_.gates.columns * kGroup);
    gradient_[0] = arena.take<C>(kTinyRows * widest_);
    gradient_[1] = arena.take<C>(kTinyRows * widest_);
    kept_ = arena.take<C>(kTinyRows * widest_);
    input_ = arena.take<C>(kTinyRows * widest_);
    row_ = arena.take<C>(widest_);
  }

  // Experts order[first] up to order[last].
  void run(int first, int last, C* below, C* inner) {
    gate_probabilities(level_.gates, 0, rows_, probabilities_);
    const int64_t row = padded_to_group(features_);
    for (int k = 0; k < level_.gates.count; ++k) {
      const T* grads = static_cast<const T*>(args_.grad_outputs[k]);
      read(grads, args_.grad_output_ld[k], features_, grad_outputs_ + k * kTinyRows * row, row);
    }
    std::memset(below, 0, below_size(level_) * sizeof(C));
    for (int i = first; i < last; ++i) expert(level_.order[i], below, inner);
  }

  // Sums the inputs' gradients of `parts` parts in their order.
  void finish(const C* below, int parts, const C* inner) {
    const Gates& gates = level_.gates;
    if (args_.grad_logits) {
      gate_probabilities(gates, 0, rows_, probabilities_);
      for (int k = 0; k < gates.count; ++k) {
        write_logit_gradient(gates, k, probabilities_, inner, 0, rows_, args_.grad_logits[k]);
      }
    }
    if (!args_.grad_inputs) return;
    const int64_t width = level_.widths[0];
    for (int i = 0; i < level_.experts; ++i) {
      const int stream = level_.expert_inputs[level_.order[i]];
      if (i > 0 && level_.expert_inputs[level_.order[i - 1]] == stream) continue;
      const C* sums = below + stream * kTinyRows * padded_to_group(width);
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t j = 0; j < width; ++j) {
          C sum = 0;
          for (int p = 0; p < parts; ++p) sum += sums[p * below_size(level_) + r * padded_to_group(width) + j];
          input_[j] = sum;
        }
        narrow(input_, static_cast<T*>(args_.grad_inputs[stream]) + r * width, width);
      }
    }
  }

 private:
  static int64_t widest_of(const LevelShape& level) { return TinyForward<T>::widest_of(level); }

  void read(const T* rows, int64_t ld, int64_t width, C* out, int64_t ld_out) const {
    std::memset(out, 0, kTinyRows * ld_out * sizeof(C));
    for (int64_t r = 0; r < rows_; ++r) widen(rows + r * ld, out + r * ld_out, width);
  }

  // Into kept_: what the forward pass has saved of a layer, or would have.
  void load_kept(int l, int e) {
    const int64_t width = level_.widths[l + 1];
    if (l >= saved_layers(level_.layers)) return compute_kept(e);
    read(static_cast<const T*>(args_.saved[l]) + level_.numbers[e] * rows_ * width, width, width, kept_, widest_);
  }

  // The last layer, from what the one below has saved.
  void compute_kept(int e) {
    const int l = level_.layers - 1;
    load_kept(l - 1, e);
    load_input(l, e);
    multiply_rows<T, C>(rows_, static_cast<const T*>(args_.last_weights[e]), args_.last_weight_ld[e],
                        level_.widths[l + 1], input_, level_.widths[l], kept_, widest_);
    const T* bias = static_cast<const T*>(level_.biases[weight_number(level_, l, e)]);
    const int code = level_.activations[l];
    with_activation(from_input(code) ? static_cast<int>(kNone) : code, [&](auto constant) {
      for (int64_t r = 0; r < kTinyRows; ++r) {
        C* row = kept_ + r * widest_;
        const int64_t width = r < rows_ ? level_.widths[l + 1] : 0;
        for (int64_t o = 0; bias && o < width; ++o) row[o] += static_cast<C>(to_compute(bias[o]));
        for (int64_t o = 0; o < width; o += Simd<C>::lanes) {
          store(row + o, activate<decltype(constant)::value, C>(load(row + o)));
        }
        for (int64_t o = width; o < widest_; ++o) row[o] = 0;
      }
    });
  }

  // Into input_: what a layer has read. Values that are not there may become what the activation makes of zero.
  void load_input(int l, int e) {
    if (l == 0) {
      const int stream = level_.expert_inputs[e];
      return read(static_cast<const T*>(level_.inputs[stream]), level_.input_ld[stream], level_.widths[0], input_,
                  widest_);
    }
    const int code = level_.activations[l - 1];
    with_activation(from_input(code) ? code : static_cast<int>(kNone), [&](auto constant) {
      for (int64_t i = 0; i < kTinyRows * widest_; i += Simd<C>::lanes) {
        store(input_ + i, activate<decltype(constant)::value, C>(load(kept_ + i)));
      }
    });
  }

  void expert(int e, C* below, C* inner) {
    const int last = level_.layers - 1;
    load_kept(last, e);
    mix_back(e, inner);
    if (!args_.need_experts) return;
    through_activation(last);
    for (int l = last; l >= 0; --l) {
      const int64_t width = level_.widths[l], outputs = level_.widths[l + 1];
      const int64_t at = weight_number(level_, l, e);
      const C* gradient = gradient_[l % 2];
      if (l > 0) load_kept(l - 1, e);
      if (args_.need_weights) {
        load_input(l, e);
        with_rows(rows_, [&](auto rows) {
          outer_products<T, C, decltype(rows)::value>(gradient, widest_, outputs, input_, widest_, width, row_,
                                                      static_cast<T*>(args_.grad_weights[at]));
        });
      }
      if (args_.grad_biases[at]) {
        for (int64_t o = 0; o < outputs; ++o) {
          row_[o] = 0;
          for (int64_t r = 0; r < rows_; ++r) row_[o] += gradient[r * widest_ + o];
        }
        narrow(row_, static_cast<T*>(args_.grad_biases[at]), outputs);
      }
      if (l == 0 && !args_.grad_inputs) return;
      C* into = l > 0 ? gradient_[(l - 1) % 2] : below + level_.expert_inputs[e] * kTinyRows * padded_to_group(width);
      const int64_t ld = l > 0 ? widest_ : padded_to_group(width);
      if (l > 0) std::memset(into, 0, kTinyRows * widest_ * sizeof(C));
      add_transposed_rows<T, C>(rows_, static_cast<const T*>(level_.weights[at]), level_.weight_ld[at], width, gradient,
                                widest_, outputs, into, ld);
      if (l > 0) through_activation(l - 1);
    }
  }

  // From the outputs' gradients to those of an expert's outputs, and their inner products with these.
  void mix_back(int e, C* inner) {
    const Gates& gates = level_.gates;
    const int last = level_.layers - 1, code = level_.activations[last];
    const int64_t row = padded_to_group(features_);
    const C* after = kept_;
    if (from_input(code)) {
      load_input(last + 1, e);
      after = input_;
    }
    C* whole = gradient_[last % 2];
    std::memset(whole, 0, kTinyRows * widest_ * sizeof(C));
    for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
      const GateUse use = gates.uses[u];
      for (int64_t r = 0; r < rows_; ++r) {
        const C* grads = grad_outputs_ + (use.gate * kTinyRows + r) * row;
        const C p = probabilities_[use.column * kGroup + r];
        Vector<C> sum{};
        for (int64_t i = 0; i < row; i += Simd<C>::lanes) {
          C* place = whole + r * widest_ + i;
          const Vector<C> grad = load(grads + i);
          store(place, load(place) + broadcast(p) * grad);
          sum += grad * load(after + r * widest_ + i);
        }
        C total = 0;
        for (int j = 0; j < Simd<C>::lanes; ++j) total += sum[j];
        inner[use.column * kGroup + r] = total;
      }
    }
  }

  // From the gradient of layer l's activation that of its input, in its place, by kept_.
  void through_activation(int l) {
    C* gradient = gradient_[l % 2];
    const int64_t size = rows_ * widest_;
    with_activation(level_.activations[l], [&](auto constant) {
      for (int64_t i = 0; i < size; i += Simd<C>::lanes) {
        store(gradient + i, activation_gradient<decltype(constant)::value, C>(load(gradient + i), load(kept_ + i)));
      }
    });
    // An infinite weight makes NaN of the zeros of rows that are not there, and these are summed as well.
    std::memset(gradient + size, 0, (kTinyRows * widest_ - size) * sizeof(C));
  }

  const ChainBackwardArgs& args_;
  const LevelShape& level_;
  const int64_t rows_, features_, widest_;
  C *grad_outputs_, *probabilities_, *gradient_[2], *kept_, *input_, *row_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
