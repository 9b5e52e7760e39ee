// The backward pass of a layerwise level, from the last layer down.
//
// Of each layer the gradients dn of its normalised values come first, with a block's part of the sums that the norm's
// gradient needs. Once all rows are there, whoever reads dn makes the gradients dz of the pre-activations of it, a
// chunk of rows at a time: for the layer below, whose dn it leaves, and for the weights' gradients.
#pragma once

#include "level/layerwise_backward_scratch.h"
#include "level/slope_gradients.h"

namespace mtlk {
namespace MTLK_ISA {

// The gradients dz of one layer and a chunk of rows: [expert][group of kGradientRows rows].
template <typename Engine>
int64_t chunk_gradient_size(const LevelShape& level, int l, int64_t chunk_rows) {
  return (chunk_rows + Engine::kGradientRows - 1) / Engine::kGradientRows * Engine::gradient_size(level.widths[l + 1]);
}

template <typename Engine>
class LayerwiseBackward : RowBlock<LayerwiseBackwardArgs> {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  using Gradient = typename Engine::Gradient;

  LayerwiseBackward(const LayerwiseBackwardArgs& args, int64_t block, void* memory)
      : RowBlock(args, block * args.block_rows, rows_of_block(args, block)),
        block_(block),
        s_(args.level, group_count(args.block_rows), memory) {}

  // The last layer of experts order[first] up to order[last]: dn, and <dy, output> in inner[group][column][16].
  void last_gradient(int first, int last, C* inner) {
    const Gates& gates = level_.gates;
    const int l = level_.layers - 1;
    const int64_t features = this->features();
    for (int i = first; i < last; ++i) clear_partials(level_.order[i]);
    for (int64_t g = 0; g < groups_; ++g) {
      gate_probabilities(gates, row(g), group_rows(g), s_.probabilities);
      for (int k = 0; k < gates.count; ++k) {
        const int64_t ld = args_.grad_output_ld[k];
        pack_panel(static_cast<const T*>(args_.grad_outputs[k]) + row(g) * ld, ld, group_rows(g), features,
                   s_.grad_outputs + k * features * kGroup);
      }
      for (int i = first; i < last; ++i) {
        const int e = level_.order[i];
        const LayerReader<T> reader(args_, l, e);
        top_group(reader, e, g, inner + g * gates.columns * kGroup);
      }
    }
  }

  // The logits' gradients.
  void logit_gradient(const C* inner) {
    const Gates& gates = level_.gates;
    for (int64_t g = 0; g < groups_; ++g) {
      gate_probabilities(gates, row(g), group_rows(g), s_.probabilities);
      for (int k = 0; k < gates.count; ++k) {
        write_logit_gradient(gates, k, s_.probabilities, inner + g * gates.columns * kGroup, row(g), group_rows(g),
                             args_.grad_logits[k]);
      }
    }
  }

  // Layer l of experts order[first] up to order[last]: dz, kept in the chunk, and the dn of the layer below; for the
  // first layer the inputs' gradients, which several parts leave in `below` for `inputs`.
  void layer_gradient(const BackwardChunk& chunk, int l, int first, int last, C* below) {
    int stream = -1;
    bool fresh = true;
    for (int i = first; i < last; ++i) {
      const int e = level_.order[i];
      Gradient* const gradients = gradients_of(chunk, l, e);
      const C* const values = make_gradients(l, e, gradients);
      if (few_rows(level_)) rows_of_panel(values, level_.widths[l + 1], s_.few[0], few_ld(level_), nrows_);
      if (l > 0) {
        lower_layer(l, e, gradients);
      } else if (args_.grad_inputs) {
        if (level_.expert_inputs[e] != stream) {
          if (stream >= 0) leave_inputs(stream, below);
          stream = level_.expert_inputs[e];
          fresh = true;
        }
        if (few_rows(level_)) {
          if (fresh) std::memset(s_.below, 0, stream_size() * sizeof(C));
          multiply(l, e, gradients, [&](int64_t, int64_t, int64_t n, const C* tile) {
            for (int64_t v = 0; v < n * kGroup; v += L) store(s_.below + v, load(s_.below + v) + load(tile + v));
          });
        } else {
          add_to_stream<Engine>(level_, e, panels(gradients), groups_, s_.below, !fresh);
        }
        fresh = false;
      }
    }
    if (stream >= 0) leave_inputs(stream, below);
  }

  // Sums the inputs' gradients of `parts` parts, which lie `stride` apart, in their order.
  void reduce_input_gradients(const C* below, int parts, int64_t stride) {
    int stream = -1;
    for (int i = 0; i < level_.experts; ++i) {
      if (level_.expert_inputs[level_.order[i]] == stream) continue;
      stream = level_.expert_inputs[level_.order[i]];
      std::memset(s_.below, 0, stream_size() * sizeof(C));
      for (int p = 0; p < parts; ++p) {
        if (!reads(p, parts, stream)) continue;
        const C* from = below + p * stride + stream * stream_size();
        for (int64_t v = 0; v < stream_size(); v += L) store(s_.below + v, load(s_.below + v) + load(from + v));
      }
      write_inputs(stream);
    }
  }

 private:
  static constexpr int L = Simd<C>::lanes;

  static void store(C* place, Vector<C> value) { mtlk::MTLK_ISA::store(place, value); }
  int64_t stream_size() const { return stream_sums<Engine>(level_, groups_); }

  // Whether one of part p's experts reads the stream.
  bool reads(int p, int parts, int stream) const {
    for (int i = level_.experts * p / parts; i < level_.experts * (p + 1) / parts; ++i) {
      if (level_.expert_inputs[level_.order[i]] == stream) return true;
    }
    return false;
  }

  Gradient* gradients_of(const BackwardChunk& chunk, int l, int e) const {
    return static_cast<Gradient*>(chunk.gradients) + e * chunk_gradient_size<Engine>(level_, l, chunk.capacity) +
           (row_ - chunk.row) / Engine::kGradientRows * Engine::gradient_size(level_.widths[l + 1]);
  }

  // The dn of a group of rows.
  T* normalized_gradient(int l, int e, int64_t g) const {
    const int64_t all = group_count(level_.rows);
    return static_cast<T*>(args_.layers[l].grad) + (e * all + row(g) / kGroup) * level_.widths[l + 1] * kGroup;
  }

  void clear_partials(int e) const {
    std::memset(partials_of<C>(args_, block_, e, 0), 0, args_.partial_arrays * args_.partial_ld * sizeof(C));
  }

  void top_group(const LayerReader<T>& reader, int e, int64_t g, C* inner) {
    const Gates& gates = level_.gates;
    const int64_t features = reader.width();
    reader.load_group(row(g), group_rows(g), s_.z);
    const uint16_t* kept = draw(reader, g, s_.kept);
    const C* n = reader.normalize(row(g), group_rows(g), 0, features, s_.z, s_.normalized, s_.centred);
    reader.activated(group_rows(g), n, kept, [&](auto value) {
      for (int64_t i = 0; i < features; ++i) {
        for (int j = 0; j < kGroup; j += L) store(s_.after + i * kGroup + j, value(i, j));
      }
    });
    std::memset(s_.whole, 0, features * kGroup * sizeof(C));
    for (int u = gates.use_begin[e]; u < gates.use_begin[e + 1]; ++u) {
      const GateUse use = gates.uses[u];
      const C* grad = s_.grad_outputs + use.gate * features * kGroup;
      add_weighted(s_.probabilities + use.column * kGroup, grad, features, s_.whole);
      dot_lanes(grad, s_.after, features, inner + use.column * kGroup);
    }
    if (!args_.need_experts) return;
    start_sums(reader, g);
    normalized_values(reader, e, g, 0, features, s_.whole, n, kept);
    finish_rows(reader, g);
    add_partials(reader, e);
  }

  const uint16_t* draw(const LayerReader<T>& reader, int64_t g, uint16_t* kept) const {
    if (!reader.drops()) return nullptr;
    reader.dropout().panel(row(g), reader.width(), kept);
    return kept;
  }

  void dot_lanes(const C* a, const C* b, int64_t features, C* out) const {
    for (int j = 0; j < kGroup; j += L) {
      Vector<C> even{}, odd{};
      int64_t i = 0;
      for (; i + 1 < features; i += 2) {
        even += load(a + i * kGroup + j) * load(b + i * kGroup + j);
        odd += load(a + (i + 1) * kGroup + j) * load(b + (i + 1) * kGroup + j);
      }
      if (i < features) even += load(a + i * kGroup + j) * load(b + i * kGroup + j);
      store(out + j, even + odd);
    }
  }

  // The sums over rows and over features that a layer's normalised values leave.
  void start_sums(const LayerReader<T>& reader, int64_t g) {
    if (!reader.has_sums()) return;
    for (C* sum : s_.sums) std::memset(sum, 0, reader.width() * kGroup * sizeof(C));
    for (C* sum : s_.row_sums) std::memset(sum + g * kGroup, 0, kGroup * sizeof(C));
  }

  // dn of features [o, o + n) of group g from the gradient of the layer's outputs, in place: kept, and summed. Of a
  // layer with Dice these are all features.
  void normalized_values(const LayerReader<T>& reader, int e, int64_t g, int64_t o, int64_t n, C* grad, const C* values,
                         const uint16_t* kept) {
    const C by = reader.scale();
    clear_absent(group_rows(g), n, grad);  // where an infinite weight has made NaN of their zeros
    for (int64_t i = 0; kept && i < n; ++i) {
      for (int j = 0; j < kGroup; j += L) {
        store(grad + i * kGroup + j, kept_lanes<C>(load(grad + i * kGroup + j), kept[i] >> j, by));
      }
    }
    if (reader.code() == kPrelu) {
      prelu_gradient(reader, o, n, values, grad, s_.sums[kSlopeSum] + o * kGroup);
    } else if (reader.code() == kDice) {
      dice_gradient(reader, row(g), group_rows(g), values, grad, s_.sums[kSlopeSum]);
    } else {
      with_activation(reader.code(), [&](auto constant) {
        for (int64_t v = 0; v < n * kGroup; v += L) {
          store(grad + v, gradient_by_input<decltype(constant)::value, C>(load(grad + v), load(values + v)));
        }
      });
    }
    if (reader.layer().activation_slope) clear_absent(group_rows(g), n, grad);  // a slope that is not finite likewise
    auto* const stored = normalized_gradient(reader_layer(reader), e, g) + o * kGroup;
    narrow(grad, stored, n * kGroup);
    if (reader.norm() == kNoNorm) return;
    // Sums of what is read again: what they are to cancel would not cancel beside what was rounded.
    widen(stored, grad, n * kGroup);
    C *sum = s_.sums[0] + o * kGroup, *product = s_.sums[1] + o * kGroup;
    for (int64_t v = 0; v < n * kGroup; v += L) {
      const Vector<C> x = load(grad + v);
      store(sum + v, load(sum + v) + x);
      store(product + v, load(product + v) + x * load(s_.centred + v));
    }
    if (reader.norm() == kLayerNorm) sum_rows(reader, g, o, n, grad);
  }

  int reader_layer(const LayerReader<T>& reader) const { return static_cast<int>(&reader.layer() - args_.layers); }

  template <int Code, typename V>
  static MTLK_INLINE Vector<V> gradient_by_input(Vector<V> grad, Vector<V> x) {
    if constexpr (Code == kTanh || Code == kSigmoid) x = activate<Code, V>(x);
    return activation_gradient<Code, V>(grad, x);
  }

  void sum_rows(const LayerReader<T>& reader, int64_t g, int64_t o, int64_t n, const C* grad) {
    const C* factor = reader.channels(reader.layer().factor) + o;
    for (int j = 0; j < kGroup; j += L) {
      C *mean = s_.row_sums[0] + g * kGroup + j, *slope = s_.row_sums[1] + g * kGroup + j;
      Vector<C> m = load(mean), s = load(slope);
      for (int64_t i = 0; i < n; ++i) {
        const Vector<C> x = load(grad + i * kGroup + j) * factor[i];
        m += x;
        s += x * load(s_.centred + i * kGroup + j);
      }
      store(mean, m);
      store(slope, s);
    }
  }

  void finish_rows(const LayerReader<T>& reader, int64_t g) {
    if (reader.norm() != kLayerNorm) return;
    const C width = static_cast<C>(reader.width());
    C* const out[2] = {const_cast<C*>(reader.per_row(reader.layer().row_mean)) + row(g),
                       const_cast<C*>(reader.per_row(reader.layer().row_slope)) + row(g)};
    for (int which = 0; which < 2; ++which) {
      for (int64_t r = 0; r < group_rows(g); ++r) out[which][r] = s_.row_sums[which][g * kGroup + r] / width;
    }
  }

  void add_partials(const LayerReader<T>& reader, int e) {
    for (int which = reader.norm() == kNoNorm ? kSlopeSum : 0; which < (reader.layer().activation_slope ? 3 : 2);
         ++which) {
      C* partials = partials_of<C>(args_, block_, e, which);
      for (int64_t i = 0; i < reader.width(); ++i) {
        Vector<C> sum{};
        for (int j = 0; j < kGroup; j += L) sum += load(s_.sums[which] + i * kGroup + j);
        partials[i] += sum_lanes<C>(sum);
      }
    }
  }

  // dz of an expert's layer, as panels for the product and for the weights' gradients. Returns those of the last group.
  const C* make_gradients(int l, int e, Gradient* gradients) {
    const LayerReader<T> reader(args_, l, e);
    const int64_t width = reader.width();
    C* values = nullptr;
    for (int64_t g = 0; g < groups_; ++g) {
      values = s_.whole;
      Element* panel = panels(gradients) + g * Engine::panel_size(width);
      Engine::clear_margin(panel, width);
      values = Engine::destination(panel, 0, values);
      pre_activations(reader, g, normalized_gradient(l, e, g), values);
      if constexpr (!Engine::kGradientIsPanel) {
        Engine::store_gradients(panel, gradients, width, g, 0, width,
                                [&](int64_t i, int j) { return load(values + i * kGroup + j); });
      }
    }
    return values;
  }

  Element* panels(Gradient* gradients) const {
    if constexpr (Engine::kGradientIsPanel) {
      return gradients;
    } else {
      return s_.panel;
    }
  }

  void pre_activations(const LayerReader<T>& reader, int64_t g, const T* dn, C* out) {
    const int64_t width = reader.width();
    const NormLayer& layer = reader.layer();
    if (layer.norm == kNoNorm) return widen(dn, out, width * kGroup);
    reader.load_group(row(g), group_rows(g), s_.z);
    const C* factor = reader.channels(layer.factor);
    if (layer.norm == kBatchNorm) {
      const C *center = reader.channels(layer.center), *slope = reader.channels(layer.grad_slope);
      const C* level = reader.channels(layer.grad_offset);
      for (int64_t i = 0; i < width; ++i) {
        const Vector<C> f = broadcast(factor[i]), c = broadcast(center[i]), s = broadcast(slope[i]);
        for (int64_t v = i * kGroup; v < (i + 1) * kGroup; v += L) {
          store(out + v, load_as<T, C>(dn + v) * f + ((load(s_.z + v) - c) * s + level[i]));
        }
      }
    } else {
      C mean[kGroup], rstd[kGroup], row_mean[kGroup], row_slope[kGroup];
      reader.copy_means(row(g), group_rows(g), mean);
      reader.copy_rows(layer.rstd, row(g), group_rows(g), rstd);
      reader.copy_rows(layer.row_mean, row(g), group_rows(g), row_mean);
      reader.copy_rows(layer.row_slope, row(g), group_rows(g), row_slope);
      for (int j = 0; j < kGroup; j += L) {
        const Vector<C> m = load(mean + j), r = load(rstd + j), a = load(row_mean + j), b = load(row_slope + j);
        for (int64_t i = 0; i < width; ++i) {
          const Vector<C> zhat = (load(s_.z + i * kGroup + j) - m) * r;
          store(out + i * kGroup + j, (load_as<T, C>(dn + i * kGroup + j) * factor[i] - a - zhat * b) * r);
        }
      }
    }
    for (int64_t i = 0; group_rows(g) < kGroup && i < width; ++i) {  // absent rows add nothing to any sum
      std::memset(out + i * kGroup + group_rows(g), 0, (kGroup - group_rows(g)) * sizeof(C));
    }
  }

  // f(group, feature, n, tile) for each tile of the gradients of what layer l read; few rows, from s_.few[0], make one.
  template <typename F>
  void multiply(int l, int e, Gradient* gradients, F f) {
    if (!few_rows(level_)) return multiply_below<Engine>(level_, l, e, panels(gradients), groups_, s_.tile, f);
    const int64_t width = level_.widths[l], ld = few_ld(level_), at = weight_number(level_, l, e);
    std::memset(s_.few[1], 0, computed_rows(nrows_) * ld * sizeof(C));
    RowsEngine<T>::multiply_back(nrows_, static_cast<const T*>(level_.weights[at]), level_.weight_ld[at], width,
                                 s_.few[0], ld, level_.widths[l + 1], s_.few[1], ld);
    panel_of_rows(s_.few[1], ld, nrows_, width, s_.few_panel);
    f(0, 0, width, s_.few_panel);
  }

  // The dn of the layer below l.
  void lower_layer(int l, int e, Gradient* gradients) {
    const LayerReader<T> reader(args_, l - 1, e);
    const int64_t width = reader.width();
    clear_partials(e);
    for (int64_t g = 0; g < groups_; ++g) {
      reader.load_group(row(g), group_rows(g), s_.z + g * width * kGroup);
      draw(reader, g, s_.kept + g * width);
      start_sums(reader, g);
    }
    const auto lower = [&](int64_t g, int64_t o, int64_t n, C* grad) {
      const C* z = s_.z + (g * width + o) * kGroup;
      const C* values = reader.normalize(row(g), group_rows(g), o, n, z, s_.normalized, s_.centred);
      normalized_values(reader, e, g, o, n, grad, values, reader.drops() ? s_.kept + g * width + o : nullptr);
    };
    if (reader.code() == kDice) {  // which needs sums over all features
      multiply(l, e, gradients, [&](int64_t g, int64_t o, int64_t n, const C* tile) {
        std::memcpy(s_.rows + (g * width + o) * kGroup, tile, n * kGroup * sizeof(C));
      });
      for (int64_t g = 0; g < groups_; ++g) lower(g, 0, width, s_.rows + g * width * kGroup);
    } else {
      multiply(l, e, gradients, lower);
    }
    for (int64_t g = 0; g < groups_; ++g) finish_rows(reader, g);
    add_partials(reader, e);
  }

  void leave_inputs(int stream, C* below) {
    if (!below) return write_inputs(stream);
    std::memcpy(below + stream * stream_size(), s_.below, stream_size() * sizeof(C));
  }

  void write_inputs(int stream) { write_stream<Engine>(level_, s_.below, row_, nrows_, args_.grad_inputs[stream]); }

  const int64_t block_;
  LayerwiseBackwardScratch<Engine> s_;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
