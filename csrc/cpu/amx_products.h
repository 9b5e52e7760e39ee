// Products of pairs of bfloat16 on AMX tiles.
#pragma once

#include "pair_factor.h"

namespace mtlk {
namespace MTLK_ISA {

template <int Planes>
class PairProducts {
 public:
  static constexpr int64_t kMostNaturalRows = INT64_MAX;   // a tile is loaded row by row in any case
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
      const int64_t parts = (a.both ? 2 : 1) * (b.both ? 2 : 1);
      for (int64_t part = 0; part < parts; ++part) {
        const bool second_a = part * 2 >= parts && a.both, second_b = b.both && part % 2 != 0;
        product_split(second_a ? a.second : a.first, a.step, second_a ? a.rows - kGroup : a.rows,
                      second_b ? b.second : b.first, b.step, steps,
                      (second_b ? out1 : out0) + (second_a ? kGroup * ld : 0), ld, add, ahead.share(part, 1, parts));
      }
    }
  }

 private:
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
    const int64_t a_row = a.row * static_cast<int64_t>(sizeof(BFloat16));
    Fetcher fetcher(ahead, steps);
    for (int64_t k = 0; k < steps; ++k) {
      fetcher.step();
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

  // Tile 0 sums the leading planes' products, tile 1 the rest, which is too small to lose anything to rounding.
  static void product_split(const BFloat16* a, int64_t a_step, int64_t rows, const BFloat16* b, int64_t b_step,
                            int64_t steps, float* out, int64_t ld, bool add, const Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    Fetcher fetcher(ahead, steps);
    const BFloat16 *left = a, *right = b;
    for (int64_t k = 0; k < steps; ++k, left += a_step, right += b_step) {
      fetcher.step();
      _tile_loadd(5, right, 64);
      _tile_loadd(6, right + kPairTile, 64);
      if constexpr (Planes == 3) _tile_loadd(7, right + 2 * kPairTile, 64);
      _tile_loadd(4, left, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      if constexpr (Planes == 3) _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(4, left + kPairTile, 64);
      _tile_dpbf16ps(1, 4, 5);
      if constexpr (Planes == 3) {
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(4, left + 2 * kPairTile, 64);
        _tile_dpbf16ps(1, 4, 5);
      }
    }
    alignas(64) float rest[kGroup * kGroup], lead[kGroup * kGroup];
    if (add) {
      _tile_stored(0, lead, kGroup * sizeof(float));
    } else {
      _tile_stored(0, out, ld * sizeof(float));
    }
    _tile_stored(1, rest, kGroup * sizeof(float));
    store_sums<Planes, kGroup>(a, a_step, b, b_step, steps, add ? lead : out, add ? kGroup : ld, rest, rows, out, ld,
                               add);
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
