// Evaluates layers in bfloat16 on AMX tiles: weights in their natural layout, activations as paired panels.
#pragma once

#include "expert_mixture_args.h"
#include "panels.h"

namespace mtlk {
namespace MTLK_ISA {

struct AmxEngine {
  using T = BFloat16;
  using C = float;
  using Element = BFloat16;
  using Weight = BFloat16;
  static constexpr int64_t kRows = 32;  // two tiles of 16 features by two groups of rows
  static constexpr int64_t kGroups = 2;
  static constexpr WeightForm kForm = WeightForm::kPadded;
  static constexpr int64_t kDepthStep = 32;  // features of one tile product

  static int64_t tiles(int64_t features) { return (features + kRows - 1) / kRows; }
  static int64_t tile_begin(int64_t features, int64_t t) { return t * kRows < features ? t * kRows : features; }
  static int64_t panel_size(int64_t features) { return rounded(features) * kGroup; }
  static int64_t rounded(int64_t n) { return (n + kDepthStep - 1) / kDepthStep * kDepthStep; }

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

  static void pack(const T* rows, int64_t ld, int64_t nrows, int64_t features, Element* panel) {
    alignas(64) T block[kGroup * kDepthStep];
    for (int64_t f = 0; f < features; f += kDepthStep) {
      const int64_t width = features - f < kDepthStep ? features - f : kDepthStep;
      if (width == kDepthStep && nrows == kGroup && ld % 2 == 0) {
        transpose16(rows + f, ld / 2, panel + f * kGroup, kGroup);
        continue;
      }
      std::memset(block, 0, sizeof(block));
      for (int64_t r = 0; r < nrows; ++r) std::memcpy(block + r * kDepthStep, rows + r * ld + f, width * sizeof(T));
      transpose16(block, kDepthStep / 2, panel + f * kGroup, kGroup);
    }
  }

  static void unpack(const Element* panel, int64_t features, T* rows, int64_t ld, int64_t nrows) {
    alignas(64) T block[kGroup * kDepthStep];
    for (int64_t f = 0; f < features; f += kDepthStep) {
      const int64_t width = features - f < kDepthStep ? features - f : kDepthStep;
      if (width == kDepthStep && nrows == kGroup && ld % 2 == 0) {
        transpose16(panel + f * kGroup, kGroup, rows + f, ld / 2);
        continue;
      }
      transpose16(panel + f * kGroup, kGroup, block, kDepthStep / 2);
      for (int64_t r = 0; r < nrows; ++r) std::memcpy(rows + r * ld + f, block + r * kDepthStep, width * sizeof(T));
    }
  }

  // Zeroes what a panel has beyond its features; store fills the rest.
  static void clear_margin(Element* panel, int64_t features) {
    const int64_t written = (features + 1) / 2 * 2;
    std::memset(panel + written * kGroup, 0, (rounded(features) - written) * kGroup * sizeof(Element));
  }

  static C* destination(Element*, int64_t, C* tile) { return tile; }

  static void store(Element* panel, int64_t feature, int64_t n, const C* values) {
    for (int64_t i = 0; i < n; i += 2) {
      const __m512 even = _mm512_loadu_ps(values + i * kGroup);
      const __m512 odd = i + 1 < n ? _mm512_loadu_ps(values + (i + 1) * kGroup) : _mm512_setzero_ps();
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
      _mm512_storeu_si512(panel + (feature + i) * kGroup, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  static void tile(const Weight* w, int64_t ld, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                   int64_t groups, C* out, int64_t out_group) {
    const Weight* a = w + feature * ld;
    const int64_t size = panel_size(depth);
    product(a, a + 16 * ld, n > 16, ld, 32, panels, panels + size, groups > 1, kDepthStep * kGroup,
            rounded(depth) / kDepthStep);
    store_tiles(out, out + 16 * kGroup, n > 16, out + out_group, out + out_group + 16 * kGroup, groups > 1, kGroup);
  }

  // The backward pass gets its weights transposed, so that it is the same product.
  static constexpr WeightForm kBackwardForm = WeightForm::kPadded;
  static constexpr bool kBackwardTransposed = true;
  static void tile_back(const Weight* w, int64_t ld, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                        int64_t groups, C* out, int64_t out_group) {
    tile(w, ld, feature, n, panels, depth, groups, out, out_group);
  }

  // Gradients of pre-activations, kept for the weights' gradients: [rows / 32][feature][32], rows of a tile.
  using Gradient = BFloat16;
  static constexpr int64_t kGradientRows = 32;
  static constexpr bool kGradientIsPanel = false;
  static int64_t gradient_size(int64_t features) { return rounded(features) * kGradientRows; }
  static void store_gradient(Gradient* base, int64_t features, int64_t group, int64_t feature, int64_t n,
                             const C* values) {
    Gradient* place = base + group / 2 * gradient_size(features) + feature * kGradientRows;
    const bool second = group % 2 != 0;
    for (int64_t i = 0; i < n; ++i) {
      const __m256i value = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + i * kGroup));
      if (second) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + i * kGradientRows + kGroup), value);
      } else {  // zeroes the second group, which may not come
        _mm512_storeu_si512(place + i * kGradientRows, _mm512_zextsi256_si512(value));
      }
    }
  }

  // What a layer read, paired along the rows: [feature / 16][rows / 2][16][2].
  using Operand = BFloat16;
  static int64_t operand_size(int64_t features, int64_t nrows) { return rounded(features) * rounded(nrows); }
  static const Operand* direct_operand(const T*, int64_t) { return nullptr; }
  template <typename Activate>
  static void make_operand(const T* rows, int64_t ld, int64_t nrows, int64_t features, Operand* out, Activate f) {
    const int64_t half = rounded(nrows) / 2;
    alignas(64) T pair[2][kDepthStep];
    alignas(64) C wide[kDepthStep];
    for (int64_t column = 0; column < features; column += kDepthStep) {
      const int64_t width = features - column < kDepthStep ? features - column : kDepthStep;
      for (int64_t m = 0; m < 2 * half; m += 2) {
        for (int64_t r = 0; r < 2; ++r) {
          std::memset(pair[r], 0, sizeof(pair[r]));
          if (m + r >= nrows) continue;
          widen(rows + (m + r) * ld + column, wide, width);
          f(wide, width / kGroup * kGroup + (width % kGroup ? kGroup : 0));
          narrow(wide, pair[r], width);
        }
        for (int64_t j = 0; j < 2; ++j) {
          const __m512i even = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<__m256i*>(pair[0] + 16 * j)));
          const __m512i odd = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<__m256i*>(pair[1] + 16 * j)));
          Operand* place = out + ((column / 16 + j) * half + m / 2) * 32;
          _mm512_storeu_si512(place, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
      }
    }
  }

  static constexpr int64_t kColumns = 32;
  static constexpr int64_t kSumMultiple = 32;
  static void weight_gradient(const Gradient* gradient, int64_t outputs, const Operand* operand, int64_t, int64_t nrows,
                              int64_t column, int64_t, C* grad, int64_t ld, bool add) {
    alignas(64) C sums[kRows * kColumns];
    const int64_t steps = rounded(nrows) / kDepthStep;
    const Operand* b = operand + column / 16 * steps * 16 * 32;
    for (int64_t o = 0; o < outputs; o += kRows) {
      const int64_t n = outputs - o < kRows ? outputs - o : kRows;
      const Gradient* a = gradient + o * kGradientRows;
      product(a, a + 16 * kGradientRows, n > 16, kGradientRows, gradient_size(outputs), b, b + steps * 16 * 32, true,
              16 * 32, steps);
      store_tiles(sums, sums + 16 * kColumns, n > 16, sums + 16, sums + 16 * kColumns + 16, true, kColumns);
      for (int64_t i = 0; i < n; ++i) {
        C* place = grad + (o + i) * ld + column;
        for (int64_t j = 0; j < kColumns; j += 16) {
          const __m512 sum = _mm512_load_ps(sums + i * kColumns + j);
          _mm512_storeu_ps(place + j, add ? _mm512_add_ps(_mm512_loadu_ps(place + j), sum) : sum);
        }
      }
    }
  }

  static void bias_gradient(const Gradient* gradient, int64_t outputs, int64_t nrows, C* grad, bool add) {
    for (int64_t o = 0; o < outputs; ++o) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t m = 0; m < nrows; m += kGradientRows) {
        const Gradient* place = gradient + m / kGradientRows * gradient_size(outputs) + o * kGradientRows;
        const __m512i pairs = _mm512_loadu_si512(place);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 odd =
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
        sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
      }
      grad[o] = (add ? grad[o] : 0.0f) + _mm512_reduce_add_ps(sum);
    }
  }

 private:
  // Tiles 0 to 3 = [a0; a1] [b0, b1] over `steps` products; a1 and b1 only if asked for. Rows of a tile of a are ld
  // apart, those of b 32.
  static void product(const BFloat16* a0, const BFloat16* a1, bool second_a, int64_t ld, int64_t a_step,
                      const BFloat16* b0, const BFloat16* b1, bool second_b, int64_t b_step, int64_t steps) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (second_a && second_b) {
      for (int64_t k = 0; k < steps; ++k) {
        _tile_loadd(4, a0 + k * a_step, ld * 2);
        _tile_loadd(6, b0 + k * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1 + k * b_step, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1 + k * a_step, ld * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      return;
    }
    for (int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a0 + k * a_step, ld * 2);
      _tile_loadd(6, b0 + k * b_step, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (second_b) {
        _tile_loadd(7, b1 + k * b_step, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (second_a) {
        _tile_loadd(5, a1 + k * a_step, ld * 2);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
  }

  static void store_tiles(C* c00, C* c10, bool second_a, C* c01, C* c11, bool second_b, int64_t ld) {
    _tile_stored(0, c00, ld * 4);
    if (second_b) _tile_stored(1, c01, ld * 4);
    if (second_a) _tile_stored(2, c10, ld * 4);
    if (second_a && second_b) _tile_stored(3, c11, ld * 4);
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
