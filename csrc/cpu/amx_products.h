// Products of pairs of bfloat16 on AMX tiles.
#pragma once

#include "pair_factor.h"

namespace mtlk {
namespace MTLK_ISA {

template <int Planes>
class PairProducts {
 public:
  static constexpr int64_t kCacheBytes = 2 * 1024 * 1024;  // of the second level, on every processor with AMX

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

  // out0[i * ld] and out1 = rows of both tiles of a against the first and the second tile of b, or this added to them.
  static void run(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1, int64_t ld,
                  bool add, const Ahead& ahead) {
    if constexpr (Planes == 1) {
      product_2x2(a, b, steps, out0, out1, ld, add, ahead);
    } else {
      // Short depths find their factors near, and run fastest with a register for each plane; long ones wait for the
      // second-level cache, and read b once for both tiles of a.
      const bool together = a.both && steps >= kLongDepth;
      const int64_t parts = (a.both && !together ? 2 : 1) * (b.both ? 2 : 1);
      int64_t part = 0;
      const auto next = [&] { return ahead.share(part++, 1, parts); };
      if (together) {
        product_split<true>(a, b.first, b.step, steps, out0, ld, add, next());
        if (b.both) product_split<true>(a, b.second, b.step, steps, out1, ld, add, next());
        return;
      }
      product_split<false>(a, b.first, b.step, steps, out0, ld, add, next());
      if (b.both) product_split<false>(a, b.second, b.step, steps, out1, ld, add, next());
      if (!a.both) return;
      const PairFactor second{a.second, nullptr, a.step, false};
      product_split<false>(second, b.first, b.step, steps, out0 + kGroup * ld, ld, add, next());
      if (b.both) product_split<false>(second, b.second, b.step, steps, out1 + kGroup * ld, ld, add, next());
    }
  }

 private:
  static constexpr int64_t kLongDepth = 20;  // steps

  static void product_2x2(const PairFactor& a, const PairFactor& b, int64_t steps, float* out0, float* out1, int64_t ld,
                          bool add, const Ahead& ahead) {
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
    Fetcher fetcher(ahead, steps);
    for (int64_t k = 0; k < steps; ++k) {
      fetcher.step();
      _tile_loadd(4, a.first + k * a.step, 64);
      _tile_loadd(6, b.first + k * b.step, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (b.both) {
        _tile_loadd(7, b.second + k * b.step, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (a.both) {
        _tile_loadd(5, a.second + k * a.step, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (b.both) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out0, ld * sizeof(float));
    if (b.both) _tile_stored(1, out1, ld * sizeof(float));
    if (a.both) _tile_stored(2, out0 + kGroup * ld, ld * sizeof(float));
    if (a.both && b.both) _tile_stored(3, out1 + kGroup * ld, ld * sizeof(float));
  }

  // Tiles 0 and 2 sum the leading planes' products with the first and, for `Both`, the second tile of a, 1 and 3 the
  // rest, which is too small to lose anything to rounding. Tile numbers are part of an instruction's text, so both
  // halves are written out.
  template <bool Both>
  static void product_split(const PairFactor& a, const BFloat16* b, int64_t b_step, int64_t steps, float* out,
                            int64_t ld, bool add, const Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    Fetcher fetcher(ahead, steps);
    for (int64_t k = 0; k < steps; ++k) {
      fetcher.step();
      const BFloat16* right = b + k * b_step;
      _tile_loadd(5, right, 64);
      _tile_loadd(6, right + kPairTile, 64);
      if constexpr (Planes == 3) _tile_loadd(7, right + 2 * kPairTile, 64);
      const BFloat16* first = a.first + k * a.step;
      _tile_loadd(4, first, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      if constexpr (Planes == 3) _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(4, first + kPairTile, 64);
      _tile_dpbf16ps(1, 4, 5);
      if constexpr (Planes == 3) {
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(4, first + 2 * kPairTile, 64);
        _tile_dpbf16ps(1, 4, 5);
      }
      if constexpr (!Both) continue;
      const BFloat16* second = a.second + k * a.step;
      _tile_loadd(4, second, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 6);
      if constexpr (Planes == 3) _tile_dpbf16ps(3, 4, 7);
      _tile_loadd(4, second + kPairTile, 64);
      _tile_dpbf16ps(3, 4, 5);
      if constexpr (Planes == 3) {
        _tile_dpbf16ps(3, 4, 6);
        _tile_loadd(4, second + 2 * kPairTile, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    __m512 lead[kGroup], rest[kGroup];
    _tile_stored(0, lead, kGroup * sizeof(float));
    _tile_stored(1, rest, kGroup * sizeof(float));
    store_sums<Planes, kGroup>(a.first, a.step, b, b_step, steps, lead, rest, out, ld, add);
    if constexpr (!Both) return;
    _tile_stored(2, lead, kGroup * sizeof(float));
    _tile_stored(3, rest, kGroup * sizeof(float));
    store_sums<Planes, kGroup>(a.second, a.step, b, b_step, steps, lead, rest, out + kGroup * ld, ld, add);
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
