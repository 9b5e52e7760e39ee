// SNR-Trans: for each output the open routes' products, one after another, into sums that stay in cache.
//
// z scales a product's tile on its way from the registers to the sums, so that neither a scaled weight nor a product is
// ever stored. A block's inputs are packed once, each when the first open route reads it.
#pragma once

#include "gemm/panels.h"
#include "simd/prefetch.h"
#include "snr/snr_args.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
class SnrTransBlock {
 public:
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Element = typename Engine::Element;

  static int64_t bytes(const SnrSum& call, int64_t nrows) {
    const int64_t groups = group_count(nrows);
    int64_t total = Arena::bytes<Element*>(call.inputs) + Arena::bytes<bool>(call.inputs);
    for (int j = 0; j < call.inputs; ++j) {
      total += Arena::bytes<Element>(Engine::panel_size(call.input_widths[j]) * groups);
    }
    return total + Arena::bytes<C>(widest_output(call) * groups * kGroup) + Arena::bytes<C>(kTileGroup * kGroups);
  }

  SnrTransBlock(const SnrSum& call, int64_t row, int64_t nrows, void* memory)
      : call_(call), row_(row), nrows_(nrows), groups_(group_count(nrows)) {
    Arena arena(memory);
    panels_ = arena.take<Element*>(call.inputs);
    packed_ = arena.take<bool>(call.inputs);
    for (int j = 0; j < call.inputs; ++j) {
      panels_[j] = arena.take<Element>(Engine::panel_size(call.input_widths[j]) * groups_);
      packed_[j] = false;
    }
    sums_ = arena.take<C>(widest_output(call) * groups_ * kGroup);
    tile_ = arena.take<C>(kTileGroup * kGroups);
  }

  void run(int first, int last) {
    for (int i = first; i < last; ++i) {
      const int begin = call_.route_begin[i], end = call_.route_begin[i + 1];
      const int64_t width = call_.output_widths[i];
      if (begin == end) std::memset(sums_, 0, groups_ * width * kGroup * sizeof(C));
      for (int r = begin; r < end; ++r) {
        if (!packed_[call_.routes[r].input]) pack(call_.routes[r].input);
        add_route(r, r + 1 < call_.route_begin[last] ? r + 1 : call_.route_begin[first], r == begin);
      }
      T* rows = static_cast<T*>(call_.out[i]) + row_ * width;
      for (int64_t g = 0; g < groups_; ++g) {
        unpack_panel(sums_ + g * width * kGroup, width, rows + g * kGroup * width, width, group_rows(g));
      }
    }
  }

 private:
  static constexpr int64_t kTileGroup = Engine::kRows * kGroup;
  static constexpr int64_t kGroups = Engine::kGroups;

  static int64_t widest_output(const SnrSum& call) {
    int64_t widest = 0;
    for (int i = 0; i < call.outputs; ++i) {
      widest = call.output_widths[i] > widest ? call.output_widths[i] : widest;
    }
    return widest;
  }
  int64_t group_rows(int64_t g) const { return rows_of_group(nrows_, g * kGroup); }

  void pack(int j) {
    const int64_t width = call_.input_widths[j], ld = call_.in_ld[j];
    const T* rows = static_cast<const T*>(call_.in[j]) + row_ * ld;
    for (int64_t g = 0; g < groups_; ++g) {
      Element* panel = panels_[j] + g * Engine::panel_size(width);
      Engine::pack(rows + g * kGroup * ld, ld, group_rows(g), width, panel);
    }
    packed_[j] = true;
  }

  // The weights of tile t of a route; a transposed weight that is not prepared lies in too many pieces.
  Prefetch weights_of(int r, int64_t t) const {
    const SnrRoute& route = call_.routes[r];
    if (call_.transposed && !Engine::kBackwardTransposed) return {};
    const int64_t width = call_.output_widths[route.output], o = Engine::tile_begin(width, t);
    return Engine::weight_rows(weight(route), route.weight_ld, call_.input_widths[route.input], o,
                               Engine::tile_begin(width, t + 1) - o);
  }
  static const typename Engine::Weight* weight(const SnrRoute& route) {
    return static_cast<const typename Engine::Weight*>(route.weight);
  }

  // Adds route r to the sums, or sets them; route `next` comes after it.
  void add_route(int r, int next, bool first) {
    const SnrRoute& route = call_.routes[r];
    const int64_t depth = call_.input_widths[route.input], width = call_.output_widths[route.output];
    const Element* panels = panels_[route.input];
    const int64_t size = Engine::panel_size(depth), tiles = Engine::tiles(width);
    const Vector<C> z = broadcast(static_cast<C>(route.z));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t o = Engine::tile_begin(width, t), n = Engine::tile_begin(width, t + 1) - o;
      const Prefetch ahead = t + 1 < tiles ? weights_of(r, t + 1) : weights_of(next, 0);
      for (int64_t g0 = 0; g0 < groups_; g0 += kGroups) {
        const int64_t ng = groups_ - g0 < kGroups ? groups_ - g0 : kGroups;
        const Prefetch share = ahead.share(g0, ng, groups_);
        if (call_.transposed) {
          Engine::tile_back(weight(route), route.weight_ld, o, n, panels + g0 * size, depth, ng, tile_, kTileGroup,
                            false, share);
        } else {
          Engine::tile(weight(route), route.weight_ld, o, n, panels + g0 * size, depth, ng, tile_, kTileGroup, share);
        }
        for (int64_t g = g0; g < g0 + ng; ++g) {
          const C* tile = tile_ + (g - g0) * kTileGroup;
          C* sums = sums_ + (g * width + o) * kGroup;
          for (int64_t k = 0; k < n * kGroup; k += Simd<C>::lanes) {
            const Vector<C> value = z * load(tile + k);
            store(sums + k, first ? value : load(sums + k) + value);
          }
        }
      }
    }
  }

  const SnrSum& call_;
  const int64_t row_, nrows_, groups_;
  Element** panels_;
  bool* packed_;
  C *sums_, *tile_;
};

// Rows of gradients as the products want them.
template <typename Engine>
void snr_make_gradient(const typename Engine::T* rows, int64_t ld, int64_t nrows, int64_t features,
                       typename Engine::Gradient* out) {
  using C = typename Engine::C;
  constexpr int64_t kWidth = 32;
  alignas(64) C part[kWidth * kGroup];
  for (int64_t g = 0; g * kGroup < nrows; ++g, rows += kGroup * ld) {
    const int64_t n = rows_of_group(nrows, g * kGroup);
    if constexpr (Engine::kGradientIsPanel) {
      pack_panel(rows, ld, n, features, out + g * Engine::gradient_size(features));
    } else {
      for (int64_t f = 0; f < features; f += kWidth) {
        const int64_t width = features - f < kWidth ? features - f : kWidth;
        pack_panel(rows + f, ld, n, width, part);
        Engine::keep_gradients(out, features, g, f, width, [&](int64_t i, int) { return load(part + i * kGroup); });
      }
    }
  }
}

template <typename T>
double snr_finish(const void* sum, int64_t ld, int64_t rows, int64_t columns, const void* weight, int64_t weight_ld,
                  double z, void* grad) {
  using C = Compute<T>;
  constexpr int64_t kRun = 64;
  constexpr int L = Simd<C>::lanes;
  alignas(64) C wide[kRun], scaled[kRun];
  const C factor = static_cast<C>(z);
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const C* m = static_cast<const C*>(sum) + r * ld;
    const T* w = static_cast<const T*>(weight) + r * weight_ld;
    C inner = 0;
    Vector<C> lanes{};
    for (int64_t c = 0; c < columns; c += kRun) {
      const int64_t n = columns - c < kRun ? columns - c : kRun;
      widen(w + c, wide, n);
      int64_t k = 0;
      for (; k + L <= n; k += L) lanes += load(m + c + k) * load(wide + k);
      for (; k < n; ++k) inner += m[c + k] * wide[k];
      if (!grad) continue;
      for (k = 0; k < n; ++k) scaled[k] = factor * m[c + k];
      narrow(scaled, static_cast<T*>(grad) + r * columns + c, n);
    }
    for (int i = 0; i < L; ++i) inner += lanes[i];
    total += static_cast<double>(inner);
  }
  return total;
}

template <typename Engine>
SnrTransKernels snr_trans_kernels(const EngineTable& engine) {
  using T = typename Engine::T;
  using C = typename Engine::C;
  using Gradient = typename Engine::Gradient;
  using Operand = typename Engine::Operand;
  SnrTransKernels table{};
  table.engine = engine;
  table.sum_bytes = SnrTransBlock<Engine>::bytes;
  table.sum = [](const SnrSum& call, int64_t row, int64_t nrows, int first, int last, void* scratch) {
    Engine::begin();
    SnrTransBlock<Engine>(call, row, nrows, scratch).run(first, last);
    Engine::end();
  };
  table.gradient_bytes = [](int64_t features, int64_t nrows) {
    return (nrows + Engine::kGradientRows - 1) / Engine::kGradientRows * Engine::gradient_size(features) *
           static_cast<int64_t>(sizeof(Gradient));
  };
  table.make_gradient = [](const void* rows, int64_t ld, int64_t nrows, int64_t features, void* out) {
    snr_make_gradient<Engine>(static_cast<const T*>(rows), ld, nrows, features, static_cast<Gradient*>(out));
  };
  table.operand_bytes = [](int64_t features, int64_t nrows) {
    return Engine::operand_size(features, nrows) * static_cast<int64_t>(sizeof(Operand));
  };
  table.make_operand = [](const void* rows, int64_t ld, int64_t nrows, int64_t features, void* out) {
    const T* from = static_cast<const T*>(rows);
    if (Engine::direct_operand(from, features)) return;
    Engine::make_operand(from, ld, nrows, features, static_cast<Operand*>(out), Unchanged{});
  };
  table.columns = Engine::kColumns;
  table.product = [](const SnrProduct& call, int64_t column) {
    const Operand* direct = Engine::direct_operand(static_cast<const T*>(call.u), call.inputs);
    const Operand* operand = direct ? direct : static_cast<const Operand*>(call.operand);
    const int64_t left = call.inputs - column, ld = direct ? call.u_ld : Engine::rounded(call.inputs);
    Engine::begin();
    Engine::weight_gradient(static_cast<const Gradient*>(call.gradient), call.outputs, operand, ld, call.rows, column,
                            left < Engine::kColumns ? left : Engine::kColumns, static_cast<C*>(call.sum) + column,
                            call.ld, call.add ? Leave::kAdd : Leave::kSet);
    Engine::end();
  };
  table.finish = snr_finish<T>;
  return table;
}

}  // namespace MTLK_ISA
}  // namespace mtlk
