// Products of pairs of bfloat16 on AMX tiles.
#pragma once

#include "gemm/pair_factor.h"

namespace mtlk {
namespace MTLK_ISA {

template <int Planes>
class PairProducts {
 public:
  static constexpr int64_t kCacheBytes = 2 * 1024 * 1024;  // of the second level, on every processor with AMX
  // Of a run whose factor of two tiles stays in the first level; but all where sums cost more than that saves.
  static constexpr int64_t kDepthSteps = Planes == 3 ? INT64_MAX : 16 / Planes;

  // Tiles multiply for long enough that the loads of what the next expert's pass reads go unnoticed beside them.
  static constexpr bool kFetchesSaved = true;

  // Eight full tiles: 16 rows of 64 bytes.
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // How often a run takes a turn at what is to be done meanwhile, for each step of the depth.
  static constexpr int64_t turns(bool, bool both_b) { return kTurns * (Planes > 1 && both_b ? 2 : 1); }

  // out0[i * ld] and out1 = rows of both tiles of a against the first and the second tile of b, or this added to them.
  template <typename Meanwhile>
  static void run(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1, int64_t ld,
                  bool add, const Meanwhile& meanwhile) {
    if constexpr (Planes == 1) {
      product_2x2(a, b, steps, out0, out1, ld, add, meanwhile.over(steps * kTurns));
    } else {
      if constexpr (Planes == 3) {
        if (a.both && b.both && steps > kShortRun) {
          return product_split_2x2(a, b, steps, out0, out1, ld, add, meanwhile.over(steps * kTurns * 2));
        }
      }
      const int64_t all = b.both ? 2 : 1;
      for (int64_t part = 0; part < all; ++part) {
        const BFloat16* const tile = part == 0 ? b.first : b.second;
        float* const out = part == 0 ? out0 : out1;
        auto&& work = meanwhile.share(part, 1, all).over(steps * kTurns);
        if (a.both) {
          product_split<true>(a, tile, b.step, steps, out, ld, add, work);
        } else {
          product_split<false>(a, tile, b.step, steps, out, ld, add, work);
        }
      }
    }
  }

 private:
  static constexpr int64_t kShortRun = 4;  // of which two runs, with more to load, take less than one with more sums
  static constexpr int64_t kTurns = Planes == 3 ? 4 : Planes == 2 ? 3 : 1;  // of a step of the depth, in what follows

  template <typename Work>
  static void product_2x2(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1, int64_t ld,
                          bool add, Work&& work) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
      _tile_loadd(0, out0, ld * sizeof(float));
      if (b.both) _tile_loadd(1, out1, ld * sizeof(float));
      if (a.both) _tile_loadd(2, out0 + kGroup * ld, ld * sizeof(float));
      if (a.both && b.both) _tile_loadd(3, out1 + kGroup * ld, ld * sizeof(float));
    }
    const int64_t a_row = a.row * static_cast<int64_t>(sizeof(BFloat16));
    const bool far = a.step > Planes * kPairTile;  // of weights' gradients, whose place is in no near cache
    for (int64_t k = 0; k < steps; ++k) {
      work.step();
      if (far && k < 8) fetch_place(out0, out1, ld, 4 * k);
      _tile_loadd(4, a.first + k * a.step, a_row);
      _tile_loadd(6, b.first + k * b.step, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (b.both) {
        _tile_loadd(7, b.second + k * b.step, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (a.both) {
        _tile_loadd(5, a.second + k * a.step, a_row);
        _tile_dpbf16ps(2, 5, 6);
        if (b.both) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out0, ld * sizeof(float));
    if (b.both) _tile_stored(1, out1, ld * sizeof(float));
    if (a.both) _tile_stored(2, out0 + kGroup * ld, ld * sizeof(float));
    if (a.both && b.both) _tile_stored(3, out1 + kGroup * ld, ld * sizeof(float));
  }

  // One tile of b against both of a, or the first: more would need more sums than there are tiles. Tiles 0 and 2 sum
  // the leading planes' products, 1 and 3 the rest, which is too small to lose anything to rounding.
  template <bool Both, typename Work>
  static void product_split(const PairFactor& a, const BFloat16* b, int64_t b_step, int64_t steps, float* out,
                            int64_t ld, bool add, Work& work) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Both) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const BFloat16 *first = a.first, *second = a.second, *right = b;
    for (int64_t k = 0; k < steps; ++k, first += a.step, second += a.step, right += b_step) {
      work.step();
      _tile_loadd(4, right, 64);
      _tile_loadd(5, first, 64);
      _tile_dpbf16ps(0, 5, 4);
      if constexpr (Both) {
        _tile_loadd(6, second, 64);
        _tile_dpbf16ps(2, 6, 4);
      }
      work.step();
      if constexpr (Planes == 3) {
        _tile_loadd(7, right + 2 * kPairTile, 64);
        _tile_dpbf16ps(1, 5, 7);
        if constexpr (Both) _tile_dpbf16ps(3, 6, 7);
        work.step();
      }
      _tile_loadd(7, right + kPairTile, 64);
      _tile_dpbf16ps(1, 5, 7);
      if constexpr (Both) _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(5, first + kPairTile, 64);
      _tile_dpbf16ps(1, 5, 4);
      if constexpr (Both) {
        _tile_loadd(6, second + kPairTile, 64);
        _tile_dpbf16ps(3, 6, 4);
      }
      work.step();
      _tile_dpbf16ps(1, 5, 7);
      if constexpr (Both) _tile_dpbf16ps(3, 6, 7);
      if constexpr (Planes == 3) {
        _tile_loadd(5, first + 2 * kPairTile, 64);
        _tile_dpbf16ps(1, 5, 4);
        if constexpr (Both) {
          _tile_loadd(6, second + 2 * kPairTile, 64);
          _tile_dpbf16ps(3, 6, 4);
        }
      }
    }
    alignas(64) float lead[kGroup * kGroup], rest[kGroup * kGroup];
    _tile_stored(0, lead, kGroup * sizeof(float));
    _tile_stored(1, rest, kGroup * sizeof(float));
    store_sums<Planes, kGroup>(a.first, a.step, b, b_step, steps, lead, kGroup, rest, a.rows, out, ld, add);
    if constexpr (Both) {
      _tile_stored(2, lead, kGroup * sizeof(float));
      _tile_stored(3, rest, kGroup * sizeof(float));
      store_sums<Planes, kGroup>(a.second, a.step, b, b_step, steps, lead, kGroup, rest, a.rows - kGroup,
                                 out + kGroup * ld, ld, add);
    }
  }

  // Both tiles of a against both of b: first the sums of the products of lesser planes, which are too small to lose
  // anything to rounding, then on top of them, back through the depth, those of the leading ones.
  template <typename Work>
  static void product_split_2x2(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1,
                                int64_t ld, bool add, Work&& work) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const BFloat16 *above = a.first, *below = a.second, *left = b.first, *right = b.second;
    const bool far = a.step > Planes * kPairTile;
    const auto turn = [&](int ahead) {  // the tiles of a step lie one after another
      work.step();
      if (far) fetch_tile(above + a.step + ahead * kPairTile);
    };
    const auto load_a = [&](int plane) {
      _tile_loadd(4, above + plane * kPairTile, 64);
      _tile_loadd(5, below + plane * kPairTile, 64);
    };
    const auto load_b = [&](int plane) {
      _tile_loadd(6, left + plane * kPairTile, 64);
      _tile_loadd(7, right + plane * kPairTile, 64);
    };
    for (int64_t k = 0; k < steps; ++k, above += a.step, below += a.step, left += b.step, right += b.step) {
      turn(0);
      load_a(0);
      turn(1);
      load_b(2);
      multiply_2x2();
      turn(2);
      load_b(1);
      multiply_2x2();
      turn(3);
      load_a(1);
      multiply_2x2();
      turn(4);
      load_b(0);
      multiply_2x2();
      turn(5);
      load_a(2);
      multiply_2x2();
    }
    for (int64_t k = 0; k < steps; ++k) {
      above -= a.step;
      below -= a.step;
      left -= b.step;
      right -= b.step;
      if (far && k < 8) fetch_place(out0, out1, ld, 4 * k);
      work.step();
      load_a(0);
      work.step();
      load_b(0);
      multiply_2x2();
    }
    store_2x2(a, b, steps, out0, out1, ld, add);
  }

  // Tiles 4 and 5 against 6 and 7.
  MTLK_INLINE static void multiply_2x2() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  MTLK_INLINE static void store_2x2(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1,
                                    int64_t ld, bool add) {
    const int64_t at = add ? kGroup : ld;
    alignas(64) float sums[4][kGroup * kGroup];
    float* const place[4] = {out0, out1, out0 + kGroup * ld, out1 + kGroup * ld};
    float* const sum[4] = {add ? sums[0] : place[0], add ? sums[1] : place[1], add ? sums[2] : place[2],
                           add ? sums[3] : place[3]};
    _tile_stored(0, sum[0], at * sizeof(float));
    _tile_stored(1, sum[1], at * sizeof(float));
    _tile_stored(2, sum[2], at * sizeof(float));
    _tile_stored(3, sum[3], at * sizeof(float));
    for (int i = 0; i < 4; ++i) {
      store_sums<Planes, kGroup>(i < 2 ? a.first : a.second, a.step, i % 2 == 0 ? b.first : b.second, b.step, steps,
                                 sum[i], at, nullptr, i < 2 ? a.rows : a.rows - kGroup, place[i], ld, add);
    }
  }

  // Rows [first, first + 4) of a place of 32, which is in no near cache.
  static void fetch_place(const float* out0, const float* out1, int64_t ld, int64_t first) {
    for (int64_t i = first; i < first + 4; ++i) {
      __builtin_prefetch(out0 + i * ld, 1);
      __builtin_prefetch(out1 + i * ld, 1);
    }
  }

  static void fetch_tile(const BFloat16* tile) {
    for (int64_t i = 0; i < kPairTile; i += kPairStep) __builtin_prefetch(tile + i, 0, 3);
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
