// The forward pass of a chain for a few rows: dot products along the weights' rows, which are read once.
#pragma once

#include "gemm/rows_engine.h"
#include "level/chain_forward_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

// Elements from one row of intermediates to the next.
inline int64_t row_stride(const LevelShape& level) {
  int64_t widest = 0;
  for (int l = 0; l <= level.layers; ++l) widest = level.widths[l] > widest ? level.widths[l] : widest;
  for (int k = 0; k < level.gates.count; ++k) widest = level.gates.sizes[k] > widest ? level.gates.sizes[k] : widest;
  return padded_to_group(widest);
}

// All rows of a call.
template <typename T>
class ChainForward<RowsEngine<T>> {
 public:
  using C = Compute<T>;
  using Engine = RowsEngine<T>;

  static int64_t bytes(const LevelShape& level, int64_t, bool) {
    return 3 * Arena::bytes<C>(kFewRows * row_stride(level)) + Arena::bytes<C>(level.gates.columns * kGroup) +
           Arena::bytes<C>(mixed_size(level, kFewRows)) + Arena::bytes<T>(dots_size(level));
  }
  static int64_t mixed_size(const LevelShape& level, int64_t rows) {
    return level.gates.count * rows * padded_to_group(level.widths[level.layers]);
  }
  int64_t mixed_size() const { return mixed_size(level_, rows_); }

  ChainForward(const ChainForwardArgs& args, int64_t, int64_t nrows, void* memory)
      : args_(args), level_(args.level), rows_(nrows), widest_(row_stride(args.level)) {
    Arena arena(memory);
    input_ = arena.take<C>(kFewRows * widest_);
    hidden_[0] = arena.take<C>(kFewRows * widest_);
    hidden_[1] = arena.take<C>(kFewRows * widest_);
    probabilities_ = arena.take<C>(level_.gates.columns * kGroup);
    mixed_ = arena.take<C>(mixed_size());
    dots_ = arena.take<T>(dots_size(level_));
  }

  const C* mixed() const { return mixed_; }

  void run(int first, int last) {
    std::memset(mixed_, 0, mixed_size() * sizeof(C));
    int stream = gates(first == 0);
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i];
      if (level_.expert_inputs[e] != stream) load_input(stream = level_.expert_inputs[e]);
      const C* in = input_;
      for (int l = 0; l < level_.layers; ++l) {
        layer(e, l, in, hidden_[l % 2]);
        in = hidden_[l % 2];
      }
      mix(e, in);
    }
  }

  void finish(const C* mixed, int parts, int64_t stride) {
    const int64_t width = level_.widths[level_.layers], row = padded_to_group(width);
    for (int p = 1; p < parts; ++p) {
      for (int64_t i = 0; i < mixed_size(); ++i) {
        mixed_[i] = (p == 1 ? mixed[i] : mixed_[i]) + mixed[p * stride + i];
      }
    }
    if (parts > 1) mixed = mixed_;
    for (int k = 0; k < level_.gates.count; ++k) {
      for (int64_t r = 0; r < rows_; ++r) {
        narrow(mixed + (k * rows_ + r) * row, static_cast<T*>(args_.outputs[k]) + r * width, width);
      }
    }
  }

 private:
  // Of rows in bfloat16, where products want them: the inputs', and behind them those in between, rounded as modules
  // round them.
  static int64_t dot_stride(const LevelShape& level) { return (row_stride(level) + 31) / 32 * 32; }
  static int64_t dots_size(const LevelShape& level) { return Engine::kDots ? 2 * kFewRows * dot_stride(level) : 0; }

  void load_input(int stream) {
    const T* rows = static_cast<const T*>(level_.inputs[stream]);
    const int64_t width = level_.widths[0], stride = dot_stride(level_);
    for (int64_t r = 0; r < rows_; ++r, rows += level_.input_ld[stream]) {
      if constexpr (Engine::kDots) {
        if (width > 0) std::memcpy(dots_ + r * stride, rows, width * sizeof(T));  // there may be no memory
        std::memset(static_cast<void*>(dots_ + r * stride + width), 0, (stride - width) * sizeof(T));
      } else {
        widen(rows, input_ + r * widest_, width);
      }
    }
    if constexpr (!Engine::kDots) clear_absent_rows(input_, widest_, rows_);
  }

  // What a layer gave, for the next one.
  void load_hidden(const C* rows, int64_t width) {
    if constexpr (Engine::kDots) {
      const int64_t stride = dot_stride(level_);
      T* place = dots_ + kFewRows * stride;
      for (int64_t r = 0; r < rows_; ++r, place += stride) {
        narrow(rows + r * widest_, place, width);
        std::memset(static_cast<void*>(place + width), 0, (stride - width) * sizeof(T));
      }
    }
  }

  // As that of other engines.
  int gates(bool writes) {
    const Gates& gates = level_.gates;
    if (!gates.weights) {
      gate_probabilities(gates, 0, rows_, probabilities_);
      return -1;
    }
    int stream = -1;
    for (int k = gates.count - 1; k >= 0; --k) {  // so that the first stream is the last to be loaded
      if (gates.streams[k] != stream) load_input(stream = gates.streams[k]);
      const auto affine = Affine<T, C>::of(gates.biases, gates.scales, gates.shifts, k);
      product(static_cast<const T*>(gates.weights[k]), gates.weight_ld[k], gates.sizes[k], input_, level_.widths[0],
              hidden_[0], true);
      C* panel = probabilities_ + gates.begin[k] * kGroup;
      for (int c = 0; c < gates.sizes[k]; ++c) {
        for (int r = 0; r < kGroup; ++r) {
          panel[c * kGroup + r] = r < rows_ ? affine(hidden_[0][r * widest_ + c], c) : static_cast<C>(0);
        }
      }
      if (args_.logits) {
        T* rows = static_cast<T*>(args_.logits) + gates.begin[k];
        save_logits(panel, gates.sizes[k], writes ? rows : nullptr, gates.columns, rows_);
      }
      softmax_panel(panel, gates.sizes[k]);
    }
    return stream;
  }

  // `first`: of an input, instead of what lies in between.
  void product(const T* w, int64_t ldw, int64_t width, const C* in, int64_t depth, C* out, bool first) {
    if constexpr (Engine::kDots) {
      const int64_t stride = dot_stride(level_);
      Engine::multiply(rows_, w, ldw, width, dots_ + (first ? 0 : kFewRows * stride), stride, depth, out, widest_);
    } else {
      Engine::multiply(rows_, w, ldw, width, in, depth, out, widest_);
    }
  }

  void layer(int e, int l, const C* in, C* out) {
    const int64_t at = weight_number(level_, l, e);
    const int64_t width = level_.widths[l + 1];
    const auto affine = Affine<T, C>::of(level_, at);
    product(static_cast<const T*>(level_.weights[at]), level_.weight_ld[at], width, in, level_.widths[l], out, l == 0);
    constexpr int L = Simd<C>::lanes;
    const bool before = from_input(level_.activations[l]);
    const int64_t place = saved_place(level_, l, e);
    with_activation(level_.activations[l], [&](auto constant) {
      for (int64_t r = 0; r < rows_; ++r) {
        C* row = out + r * widest_;
        T* saved = args_.saves(l, e) ? static_cast<T*>(args_.saved[l]) + (place * rows_ + r) * width : nullptr;
        if (affine.scale) {
          for (int64_t o = 0; o < width; ++o) row[o] = row[o] * affine.scale[o] + affine.shift[o];
        } else if (affine.bias) {
          for (int64_t o = 0; o < width; ++o) row[o] += static_cast<C>(to_compute(affine.bias[o]));
        }
        if (saved && before) narrow(row, saved, width);
        for (int64_t o = 0; o < width; o += L) store(row + o, activate<decltype(constant)::value, C>(load(row + o)));
        if (saved && !before) narrow(row, saved, width);
        if (args_.signs && place < 0) {
          uint8_t* const bytes = args_.signs + sign_offset(level_, e, r);
          std::memset(bytes, 0, sign_bytes(width));
          for (int64_t o = 0; o < width; ++o) bytes[o / 8] |= static_cast<uint8_t>(!(row[o] <= 0)) << o % 8;
        }
      }
    });
    if (l + 1 < level_.layers) load_hidden(out, width);
  }

  void mix(int e, const C* values) {
    const Gates& gates = level_.gates;
    const int64_t width = level_.widths[level_.layers], row = padded_to_group(width);
    for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
      const GateUse use = gates.uses[u];
      for (int64_t r = 0; r < rows_; ++r) {
        const C p = probabilities_[use.column * kGroup + r];
        C* acc = mixed_ + (use.gate * rows_ + r) * row;
        for (int64_t o = 0; o < width; ++o) acc[o] += p * values[r * widest_ + o];
      }
    }
  }

  const ChainForwardArgs& args_;
  const LevelShape& level_;
  const int64_t rows_, widest_;
  C *input_, *hidden_[2], *probabilities_, *mixed_;
  T* dots_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
