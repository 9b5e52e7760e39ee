// The backward pass of a chain for a few rows: sums of the weights' rows, which are read once, and gradients of
// the weights that are written once.
#pragma once

#include "level/chain_backward_kernels.h"
#include "level/chain_rows_forward_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

// All rows of a call, some of its experts. The sums for the weights go straight to the results, of the storage type.
// Rows of intermediates are `widest_` apart; those that are not there are zero.
template <typename T>
class ChainBackward<RowsEngine<T>> {
 public:
  using C = Compute<T>;
  using Engine = RowsEngine<T>;

  static int64_t bytes(const LevelShape& level, int64_t) {
    return Arena::bytes<C>(level.gates.count * kFewRows * padded_to_group(level.widths[level.layers])) +
           2 * Arena::bytes<C>(level.gates.columns * kGroup) + 4 * Arena::bytes<C>(kFewRows * row_stride(level)) +
           Arena::bytes<C>(stream_size(level, kFewRows)) + Arena::bytes<C>(row_stride(level));
  }
  static int64_t stream_size(const LevelShape& level, int64_t) { return kFewRows * padded_to_group(level.widths[0]); }
  static int64_t gates_bytes(const LevelShape&, int64_t) { return 0; }  // they are in the scratch

  ChainBackward(const ChainBackwardArgs& args, const BackwardChunk&, const BackwardLayout<Engine>&, int64_t,
                int64_t nrows, void* memory)
      : args_(args),
        level_(args.level),
        rows_(nrows),
        computed_(computed_rows(nrows)),
        features_(args.level.widths[args.level.layers]),
        widest_(row_stride(args.level)) {
    Arena arena(memory);
    grad_outputs_ = arena.take<C>(level_.gates.count * kFewRows * padded_to_group(features_));
    probabilities_ = arena.take<C>(level_.gates.columns * kGroup);
    inner_ = arena.take<C>(level_.gates.columns * kGroup);
    for (C*& place : gradient_) place = arena.take<C>(kFewRows * widest_);
    kept_ = arena.take<C>(kFewRows * widest_);
    input_ = arena.take<C>(kFewRows * widest_);
    below_ = arena.take<C>(stream_size());
    row_ = arena.take<C>(widest_);
  }

  // As that of other engines.
  void run(int first, int last, const BackwardPart& part) {
    C* const left = static_cast<C*>(part.sums);
    if (part.inner) inner_ = static_cast<C*>(part.inner);
    if (left && !part.add) std::memset(left, 0, below_size() * sizeof(C));
    gate_probabilities(level_.gates, 0, rows_, probabilities_);
    const int64_t row = padded_to_group(features_);
    for (int k = 0; k < level_.gates.count; ++k) {
      const T* grads = static_cast<const T*>(args_.grad_outputs[k]);
      read(grads, args_.grad_output_ld[k], features_, grad_outputs_ + k * kFewRows * row, row);
    }
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i], stream = static_cast<int>(level_.expert_inputs[e]);
      const bool divided = left && args_.grad_inputs && args_.divided[stream] >= 0;
      C* const sums = divided ? left + args_.divided[stream] * stream_size() : below_;
      const auto reads = [&](int position) { return level_.expert_inputs[level_.order[position]] == stream; };
      if (!divided && (i == first || !reads(i - 1))) std::memset(sums, 0, stream_size() * sizeof(C));
      expert(e, sums);
      if (!divided && args_.grad_inputs && (i + 1 == last || !reads(i + 1))) write_inputs(stream, sums);
    }
    if (!part.inner && args_.grad_logits) write_logits();
  }

  void finish(const BackwardPart& first, int parts) {
    inner_ = static_cast<C*>(first.inner);
    if (args_.grad_logits) {
      gate_probabilities(level_.gates, 0, rows_, probabilities_);
      write_logits();
    }
    for (int stream = 0; args_.grad_inputs && stream < stream_count(level_); ++stream) {
      if (args_.divided[stream] < 0) continue;
      const C* const sums = static_cast<const C*>(first.sums) + args_.divided[stream] * stream_size();
      for (int64_t i = 0; i < stream_size(); ++i) {
        below_[i] = sums[i];
        for (int p = 1; p < parts; ++p) below_[i] += sums[p * below_size() + i];
      }
      write_inputs(stream, below_);
    }
  }

 private:
  int64_t stream_size() const { return stream_size(level_, rows_); }
  int64_t below_size() const { return args_.divided_count * stream_size(); }

  void write_logits() {
    for (int k = 0; k < level_.gates.count; ++k) {
      write_logit_gradient(level_.gates, k, probabilities_, inner_, 0, rows_, args_.grad_logits[k]);
    }
  }

  void write_inputs(int stream, const C* sums) {
    const int64_t width = level_.widths[0];
    for (int64_t r = 0; r < rows_; ++r) {
      narrow(sums + r * padded_to_group(width), static_cast<T*>(args_.grad_inputs[stream]) + r * width, width);
    }
  }

  void read(const T* rows, int64_t ld, int64_t width, C* out, int64_t ld_out) const {
    std::memset(out, 0, computed_ * ld_out * sizeof(C));
    for (int64_t r = 0; r < rows_; ++r) widen(rows + r * ld, out + r * ld_out, width);
  }

  // Into kept_: what the forward pass has saved of a layer, or would have.
  void load_kept(int l, int e) {
    const int64_t width = level_.widths[l + 1];
    const int64_t place = saved_place(level_, l, e);
    if (place < 0) return compute_kept(e);
    read(static_cast<const T*>(args_.saved[l]) + place * rows_ * width, width, width, kept_, widest_);
  }

  // The last layer, from what the one below has saved. Its activation is one of which signs suffice.
  void compute_kept(int e) {
    const int l = level_.layers - 1;
    load_kept(l - 1, e);
    load_input(l, e);
    Engine::multiply(rows_, static_cast<const T*>(args_.last_weights[e]), args_.last_weight_ld[e], level_.widths[l + 1],
                     input_, level_.widths[l], kept_, widest_);
    const T* bias = static_cast<const T*>(level_.biases[weight_number(level_, l, e)]);
    with_activation(level_.activations[l], [&](auto constant) {
      for (int64_t r = 0; r < computed_; ++r) {
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
      for (int64_t i = 0; i < computed_ * widest_; i += Simd<C>::lanes) {
        store(input_ + i, activate<decltype(constant)::value, C>(load(kept_ + i)));
      }
    });
  }

  void expert(int e, C* sums) {
    const int last = level_.layers - 1;
    load_kept(last, e);
    mix_back(e);
    if (!args_.need_experts) return;
    through_activation(last);
    for (int l = last; l >= 0; --l) {
      const int64_t width = level_.widths[l], outputs = level_.widths[l + 1];
      const int64_t at = weight_number(level_, l, e);
      const C* gradient = gradient_[l % 2];
      if (l > 0) load_kept(l - 1, e);
      if (args_.need_weights) {
        load_input(l, e);
        Engine::weight_gradient(rows_, gradient, outputs, input_, width, widest_, row_,
                                static_cast<T*>(args_.grad_weights[at]), args_.weights_past_caches);
      }
      if (args_.grad_biases[at]) {
        for (int64_t o = 0; o < outputs; ++o) {
          row_[o] = 0;
          for (int64_t r = 0; r < rows_; ++r) row_[o] += gradient[r * widest_ + o];
        }
        narrow(row_, static_cast<T*>(args_.grad_biases[at]), outputs);
      }
      if (l == 0 && !args_.grad_inputs) return;
      C* into = l > 0 ? gradient_[(l - 1) % 2] : sums;
      const int64_t ld = l > 0 ? widest_ : padded_to_group(width);
      if (l > 0) std::memset(into, 0, computed_ * widest_ * sizeof(C));
      Engine::multiply_back(rows_, static_cast<const T*>(level_.weights[at]), level_.weight_ld[at], width, gradient,
                            widest_, outputs, into, ld);
      if (l > 0) through_activation(l - 1);
    }
  }

  // From the outputs' gradients to those of an expert's outputs, and their inner products with these.
  void mix_back(int e) {
    const Gates& gates = level_.gates;
    const int last = level_.layers - 1, code = level_.activations[last];
    const int64_t row = padded_to_group(features_);
    const C* after = kept_;
    if (from_input(code)) {
      load_input(last + 1, e);
      after = input_;
    }
    C* whole = gradient_[last % 2];
    std::memset(whole, 0, computed_ * widest_ * sizeof(C));
    for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
      const GateUse use = gates.uses[u];
      for (int64_t r = 0; r < rows_; ++r) {
        const C* grads = grad_outputs_ + (use.gate * kFewRows + r) * row;
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
        inner_[use.column * kGroup + r] = total;
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
    std::memset(gradient + size, 0, (computed_ * widest_ - size) * sizeof(C));
  }

  const ChainBackwardArgs& args_;
  const LevelShape& level_;
  const int64_t rows_, computed_, features_, widest_;
  C *grad_outputs_, *probabilities_, *inner_, *gradient_[2], *kept_, *input_, *below_, *row_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
