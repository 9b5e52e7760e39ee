// Evaluates layers with instructions that multiply pairs of bfloat16 and add in float32: AMX tiles, AVX-512 dot
// products.
//
// A bfloat16 is one tile operand. Wider types are split into a sum of bfloat16 planes, each the rounded rest of those
// before (of weights the rest cut, which is quicker): three planes hold all 24 bits of a float32, two those of a
// float16. A product of split float32 keeps six terms, up to the last plane's weight: what is dropped is below its
// rounding error. Of float16 it keeps all four, as float32 holds such a product exactly, and a sum of them may cancel.
// The error of the sum is as small, whose leading terms have an accumulator of their own. On a processor with AMX that
// is about twice as fast as float32 multiply-adds. A tile with a NaN, which products of an infinity and a plane of the
// other sign leave, is computed again from whole numbers. A limit: beneath 2^-110 or so, where the last plane leaves
// bfloat16's normal range, precision falls off.
#pragma once

#include "gemm/engine.h"
#include "gemm/panels.h"
#include "gemm/planes.h"
#include "gemm/tile_maker.h"
#if defined(__AMX_BF16__)
#include "gemm/amx_products.h"
#else
#include "gemm/dot_products.h"
#endif

namespace mtlk {
namespace MTLK_ISA {

template <typename T_>
struct PairEngine {
  using T = T_;
  using C = float;
  using Element = BFloat16;
  using Weight = BFloat16;
  static constexpr int kPlanes = planes_of<T>();
  using Products = PairProducts<kPlanes>;
  using Split = Planes<T>;
  static constexpr int64_t kStep = kPairStep;               // features of one tile product
  static constexpr int64_t kBlock = kPairTile;              // elements of a tile
  static constexpr int64_t kPlaneBlock = kPlanes * kBlock;  // and of its planes, which lie one after another
  static constexpr int64_t kRows = 32;                      // two tiles of features by two groups of rows
  static constexpr int64_t kGroups = 2;
  static constexpr WeightForm kForm = WeightForm::kPrepared;
  // Splitting weights takes long, and what goes in and out, the longer the narrower layers are.
  static constexpr Pays kPays = kPlanes < 3 ? Pays{} : Pays{{160, 64}, {33, 50}, {128, 100}, {384, 100}};
  static constexpr int64_t kBlockBytes = Products::kCacheBytes / 2;
  // Of a forward pass, whose weights are split again for every block.
  static constexpr int64_t kForwardBlockBytes = kPlanes == 1 ? kBlockBytes : Products::kCacheBytes;
  static constexpr int64_t kChunkBytes = kPlanes == 1 ? 1 << 19 : Products::kCacheBytes / 2;

  static int64_t tiles(int64_t features) { return (features + kRows - 1) / kRows; }
  static int64_t tile_begin(int64_t features, int64_t t) { return t * kRows < features ? t * kRows : features; }
  static int64_t steps(int64_t n) { return (n + kStep - 1) / kStep; }
  static int64_t rounded(int64_t n) { return steps(n) * kStep; }

  static void begin() { Products::begin(); }
  static void end() { Products::end(); }

  // Panels: [feature / 32][plane][16 pairs of features][16 rows][2].
  static int64_t panel_size(int64_t features) { return steps(features) * kPlaneBlock; }

  static void pack(const T* rows, int64_t ld, int64_t nrows, int64_t features, Element* panel) {
    alignas(64) BFloat16 block[kPlaneBlock];
    for (int64_t f = 0; f < features; f += kStep, panel += kPlaneBlock) {
      const int64_t width = features - f < kStep ? features - f : kStep;
      if (kPlanes == 1 && width == kStep && nrows == kGroup && ld % 2 == 0) {
        transpose16(rows + f, ld / 2, panel, kGroup);
        continue;
      }
      Split::template split_rows<false>(rows + f, ld, 1, nrows, width, block);
      for (int p = 0; p < kPlanes; ++p) transpose16(block + p * kBlock, kStep / 2, panel + p * kBlock, kGroup);
    }
  }

  // Zeroes what a panel has beyond its features; store fills the rest.
  static void clear_margin(Element* panel, int64_t features) {
    const int64_t pair = features % kStep == 0 ? kStep / 2 : (features % kStep + 1) / 2;
    Element* last = panel + (steps(features) - 1) * kPlaneBlock;
    for (int p = 0; p < kPlanes; ++p) {
      std::memset(last + p * kBlock + pair * 2 * kGroup, 0, (kStep / 2 - pair) * 2 * kGroup * sizeof(Element));
    }
  }

  // The 16 rows of a feature, as they were stored.
  static __m512 load_panel(const Element* panel, int64_t feature, int) {
    const Element* place = panel + feature / kStep * kPlaneBlock + feature % kStep / 2 * 2 * kGroup;
    __m512 value = _mm512_setzero_ps();
    for (int p = kPlanes - 1; p >= 0; --p) {
      const __m512i pair = _mm512_loadu_si512(place + p * kBlock);
      const __m512i wide =
          feature % 2 == 0 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000u));
      value = p == kPlanes - 1 ? _mm512_castsi512_ps(wide) : _mm512_add_ps(value, _mm512_castsi512_ps(wide));
    }
    return value;
  }

  // Values are saved tile by tile: bfloat16 as the panel has them, other types while they are float32 and at hand;
  // whole lines `past` the caches where they can be.
  static constexpr bool kSavesTiles = true;
  static constexpr bool kSavesPanels = kPlanes == 1;
  static void save_panel(const Element* panel, int64_t feature, int64_t n, T* rows, int64_t ld, int64_t nrows,
                         bool past) {
    alignas(64) BFloat16 block[kBlock];
    past = past && can_go_past_caches(rows, ld);
    for (int64_t f = 0; f < n; f += kStep) {
      const Element* pairs = panel + (feature + f) * kGroup;
      const int64_t width = n - f < kStep ? n - f : kStep;
      if (width == kStep && nrows == kGroup && ld % 2 == 0) {
        past ? transpose16<true>(pairs, kGroup, rows + f, ld / 2) : transpose16(pairs, kGroup, rows + f, ld / 2);
        continue;
      }
      transpose16(pairs, kGroup, block, kStep / 2);
      for (int64_t r = 0; r < nrows; ++r) std::memcpy(rows + r * ld + f, block + r * kStep, width * sizeof(T));
    }
  }

  static C* destination(Element*, int64_t, C* tile) { return tile; }

  static void store(Element* panel, int64_t feature, int64_t n, const C* values) {
    store_each(panel, feature, n, [&](int64_t i, int) { return load(values + i * kGroup); });
  }
  // The same with value(i, 0) the 16 rows of feature + i.
  template <typename F>
  MTLK_INLINE static void store_each(Element* panel, int64_t feature, int64_t n, F value) {
    for (int64_t i = 0; i < n; i += 2) {
      __m512i planes[kPlanes];
      Split::split_two(i, n, value, planes);
      store_pair(pair_of(panel, feature + i), planes);
    }
  }

  // Prepared weights: [output / 16][input / 32][plane][16][32], zeros in the margins. The element of output o and input
  // i is at w[o * row_stride + i * column_stride], one of the strides 1.
  static int64_t prepared_size(int64_t outputs, int64_t inputs) {
    return group_count(outputs) * steps(inputs) * kPlaneBlock;
  }
  static void prepare(const T* w, int64_t row_stride, int64_t column_stride, int64_t outputs, int64_t inputs,
                      Weight* out) {
    for (int64_t o = 0; o < outputs; o += kGroup) {
      for (int64_t i = 0; i < inputs; i += kStep, out += kPlaneBlock) {
        // The rows of the next tile: no hardware prefetcher follows so many at once.
        for (int64_t r = 0; column_stride == 1 && r < kGroup; ++r) {
          fetch_rows(w + (o + kGroup + r) * row_stride + i, kStep);
        }
        Split::template split_rows<true>(w + o * row_stride + i * column_stride, row_stride, column_stride,
                                         outputs - o < kGroup ? outputs - o : kGroup,
                                         inputs - i < kStep ? inputs - i : kStep, out);
      }
    }
  }

  // One plane needs no preparing for a product: weights may come as they are, rows `ld` apart, where outputs fill their
  // tiles; ld is 0 for prepared ones.
  static constexpr int64_t kNaturalOutputs = kPlanes == 1 ? kGroup : 0;

  // Where the weights of a tile lie, for fetching them ahead.
  static Prefetch weight_rows(const Weight* w, int64_t ld, int64_t depth, int64_t feature, int64_t n) {
    if (ld != 0) {
      return {reinterpret_cast<const char*>(w + feature * ld), n * ld * static_cast<int64_t>(sizeof(Weight))};
    }
    const int64_t size = panel_size(depth);
    return {reinterpret_cast<const char*>(w + feature / kGroup * size),
            group_count(n) * size * static_cast<int64_t>(sizeof(Weight))};
  }

  template <typename Meanwhile>
  static void tile(const Weight* w, int64_t ld, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                   int64_t groups, C* out, int64_t out_group, const Meanwhile& meanwhile) {
    if constexpr (kNaturalOutputs > 0) {
      if (ld != 0) return natural_tile(w + feature * ld, ld, n, panels, depth, groups, out, out_group, meanwhile);
    }
    tile_back(w, 0, feature, n, panels, depth, groups, out, out_group, false, meanwhile);
  }

  // Weights in any other form are made ready tile by tile, where the forward pass wants them: elements of a tile, and
  // the turns that its products for `groups` groups of rows take at it.
  static constexpr bool kMakesTiles = true;
  using Maker = TileMaker<T>;
  static int64_t made_size(int64_t depth) { return kRows / kGroup * panel_size(depth); }
  static int64_t turns(int64_t n, int64_t groups, int64_t depth) {
    const int64_t pairs = groups / 2 * Products::turns(n > kGroup, true);
    return steps(depth) * (pairs + (groups % 2 != 0 ? Products::turns(n > kGroup, false) : 0));
  }

  // The backward pass gets its weights transposed, so that it is the same product; sums of several have room for
  // sum_features.
  static constexpr bool kBackwardTransposed = true, kCopiesColumns = false;
  static constexpr bool kFetchesSaved = Products::kFetchesSaved;
  template <typename Meanwhile>
  static void tile_back(const Weight* w, int64_t, int64_t feature, int64_t n, const Element* panels, int64_t depth,
                        int64_t groups, C* out, int64_t out_group, bool add, const Meanwhile& meanwhile) {
    const int64_t size = panel_size(depth);
    const Weight* a = w + feature / kGroup * size;
    Products::run({a, a + size, kPlaneBlock, n > kGroup}, {panels, panels + size, kPlaneBlock, groups > 1},
                  steps(depth), out, out + out_group, kGroup, add, meanwhile);
  }

  static int64_t sum_features(int64_t features) { return padded_to_group(features); }

  // Gradients of pre-activations, kept for the weights' gradients: [row / 32][feature / 16][plane][16][32 rows].
  using Gradient = BFloat16;
  static constexpr int64_t kGradientRows = kStep;
  static constexpr int64_t kGradientBytes = kPlanes * sizeof(BFloat16);
  static constexpr bool kSumsAsStored = __is_same(T, C);
  static constexpr bool kGradientIsPanel = false, kFromSigns = kPlanes == 1;
  static int64_t gradient_size(int64_t features) { return group_count(features) * kPlaneBlock; }
  // Those of features [feature, feature + n) of a group, in both their places: value(i, 0) the 16 rows of feature + i.
  template <typename F>
  MTLK_INLINE static void store_gradients(Element* panel, Gradient* base, int64_t features, int64_t group,
                                          int64_t feature, int64_t n, F value) {
    for (int64_t i = 0; i < n; i += 2) {
      __m512i planes[kPlanes];
      Split::split_two(i, n, value, planes);
      store_pair(pair_of(panel, feature + i), planes);
      place_gradients(base, features, group, feature + i, n - i, planes);
    }
  }

  // The same, only for the weights' gradients.
  template <typename F>
  MTLK_INLINE static void keep_gradients(Gradient* base, int64_t features, int64_t group, int64_t feature, int64_t n,
                                         F value) {
    for (int64_t i = 0; i < n; i += 2) {
      __m512i planes[kPlanes];
      Split::split_two(i, n, value, planes);
      place_gradients(base, features, group, feature + i, n - i, planes);
    }
  }

  // What a layer read, paired along the rows: [feature / 16][row / 32][plane][16 pairs of rows][16][2].
  using Operand = BFloat16;
  static int64_t operand_size(int64_t features, int64_t nrows) {
    return rounded(features) / kGroup * steps(nrows) * kPlaneBlock;
  }
  static const Operand* direct_operand(const T*, int64_t) { return nullptr; }
  template <typename Activate>
  static void make_operand(const T* rows, int64_t ld, int64_t nrows, int64_t features, Operand* out, Activate f) {
    alignas(64) float wide[2][kStep];
    for (int64_t column = 0; column < features; column += kStep) {
      const int64_t width = features - column < kStep ? features - column : kStep;
      if constexpr (kPlanes == 1 && __is_same(Activate, Unchanged)) {
        if (width == kStep && nrows % 2 == 0) {
          pair_rows(rows + column, ld, nrows, out + column / kGroup * steps(nrows) * kBlock);
          continue;
        }
      }
      for (int64_t m = 0; m < rounded(nrows); m += 2) {
        for (int64_t r = 0; r < 2; ++r) {
          if (width < kStep || m + r >= nrows) std::memset(wide[r], 0, sizeof(wide[r]));
          if (m + r >= nrows) continue;
          fetch_rows(rows + (m + r + kRowsAhead) * ld + column, width);
          widen(rows + (m + r) * ld + column, wide[r], width);
          f(wide[r], padded_to_group(width), m + r, column);
        }
        for (int64_t j = 0; j < kStep; j += kGroup) {
          __m512i planes[kPlanes];
          Split::split_two(_mm512_load_ps(wide[0] + j), _mm512_load_ps(wide[1] + j), planes);
          store_pair(out + ((column + j) / kGroup * steps(nrows) + m / kStep) * kPlaneBlock + m % kStep * kGroup,
                     planes);
        }
      }
    }
  }

  static constexpr int64_t kColumns = kStep;
  static constexpr int64_t kSumMultiple = kStep;
  static void weight_gradient(const Gradient* gradient, int64_t outputs, const Operand* operand, int64_t, int64_t nrows,
                              int64_t column, int64_t, C* grad, int64_t ld, Leave leave) {
    alignas(64) C sums[kGroups][kRows * kGroup];
    const int64_t all = steps(nrows), size = gradient_size(outputs);
    const Operand* b = operand + column / kGroup * all * kPlaneBlock;
    // Run after run of the depth for all outputs: what the columns read of one stays in the nearest cache.
    int64_t first = 0;
    do {
      const int64_t count = all - first < Products::kDepthSteps ? all - first : Products::kDepthSteps;
      const bool add = leave == Leave::kAdd || first > 0;
      const Operand* const from = b + first * kPlaneBlock;
      for (int64_t o = 0; o < outputs; o += kRows) {
        const int64_t n = outputs - o < kRows ? outputs - o : kRows;
        const Gradient* a = gradient + first * size + o / kGroup * kPlaneBlock;
        const PairFactor left{a, a + kPlaneBlock, size, n > kGroup, kPairStep, n};
        const PairFactor right{from, from + all * kPlaneBlock, kPlaneBlock, true};
        if (n % kGroup == 0) {
          Products::run(left, right, count, grad + o * ld, grad + o * ld + kGroup, ld, add, Prefetch{});
          continue;
        }
        Products::run(left, right, count, sums[0], sums[1], kGroup, false, Prefetch{});
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < kGroups; ++j) {
            C* place = grad + (o + i) * ld + j * kGroup;
            const __m512 sum = _mm512_load_ps(sums[j] + i * kGroup);
            _mm512_storeu_ps(place, add ? _mm512_add_ps(_mm512_loadu_ps(place), sum) : sum);
          }
        }
      }
      first += count;
    } while (first < all);
  }

  static void bias_gradient(const Gradient* gradient, int64_t outputs, int64_t nrows, C* grad, bool add) {
    for (int64_t o = 0; o < outputs; ++o) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t step = 0; step < steps(nrows); ++step) {
        const Gradient* place =
            gradient + step * gradient_size(outputs) + o / kGroup * kPlaneBlock + o % kGroup * kStep;
        __m512 value = _mm512_setzero_ps();
        for (int p = kPlanes - 1; p >= 0; --p) {
          value = _mm512_add_ps(value, load_wide(place + p * kBlock));
          value = _mm512_add_ps(value, load_wide(place + p * kBlock + kGroup));
        }
        sum = _mm512_add_ps(sum, value);
      }
      grad[o] = (add ? grad[o] : 0.0f) + _mm512_reduce_add_ps(sum);
    }
  }

 private:
  // The product with weights as they are. What the depth leaves of a last step is copied, as its tile wants zeros
  // there.
  template <typename Meanwhile>
  static void natural_tile(const Weight* w, int64_t ld, int64_t n, const Element* panels, int64_t depth, int64_t groups,
                           C* out, int64_t out_group, const Meanwhile& meanwhile) {
    const int64_t size = panel_size(depth), whole = depth / kStep, rest = depth % kStep;
    const bool both = n > kGroup;
    const PairFactor b{panels, panels + size, kPlaneBlock, groups > 1};
    if (whole > 0 || rest == 0)
      Products::run({w, w + kGroup * ld, kStep, both, ld}, b, whole, out, out + out_group, kGroup, false, meanwhile);
    if (rest == 0) return;
    alignas(64) Weight last[2][kBlock];
    const __mmask32 there = (__mmask32{1} << rest) - 1;
    for (int64_t o = 0; o < n; ++o) {
      const __m512i row = _mm512_maskz_loadu_epi16(there, w + o * ld + whole * kStep);
      _mm512_store_si512(last[0] + o * kStep, row);
    }
    const PairFactor b_last{b.first + whole * kPlaneBlock, b.second + whole * kPlaneBlock, kPlaneBlock, b.both};
    Products::run({last[0], last[1], kBlock, both}, b_last, 1, out, out + out_group, kGroup, whole > 0, Prefetch{});
  }

  static Element* pair_of(Element* panel, int64_t feature) {
    return panel + feature / kStep * kPlaneBlock + feature % kStep * kGroup;
  }
  // The planes of two vectors, their numbers in pairs.
  static void store_pair(BFloat16* place, const __m512i* planes) {
    for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(place + p * kBlock, in_pairs(planes[p]));
  }

  // The planes of a feature and of the next, or of one where n is.
  static void place_gradients(Gradient* base, int64_t features, int64_t group, int64_t feature, int64_t n,
                              const __m512i* planes) {
    __m256i one[kPlanes];
    for (int p = 0; p < kPlanes; ++p) one[p] = _mm512_castsi512_si256(planes[p]);
    place_gradient(base, features, group, feature, one);
    if (n == 1) return;
    for (int p = 0; p < kPlanes; ++p) one[p] = _mm512_extracti64x4_epi64(planes[p], 1);
    place_gradient(base, features, group, feature + 1, one);
  }
  static void place_gradient(Gradient* base, int64_t features, int64_t group, int64_t feature, const __m256i* planes) {
    Gradient* place =
        base + group / 2 * gradient_size(features) + feature / kGroup * kPlaneBlock + feature % kGroup * kStep;
    for (int p = 0; p < kPlanes; ++p) {
      if (group % 2 != 0) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + p * kBlock + kGroup), planes[p]);
      } else {  // zeroes the second group, which may not come
        _mm512_storeu_si512(place + p * kBlock, _mm512_zextsi256_si512(planes[p]));
      }
    }
  }

  // 32 features of rows, an even number of them, into operands of one plane: bfloat16 as they are.
  static void pair_rows(const T* rows, int64_t ld, int64_t nrows, Operand* out) {
    alignas(64) uint16_t order[2][2 * kGroup];  // of the first and the second 16 features, out of two rows
    for (int i = 0; i < kGroup; ++i) {
      for (int half = 0; half < 2; ++half) {
        order[half][2 * i] = static_cast<uint16_t>(half * kGroup + i);
        order[half][2 * i + 1] = static_cast<uint16_t>(kStep + half * kGroup + i);
      }
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    Operand* const second = out + steps(nrows) * kBlock;
    for (int64_t m = 0; m < rounded(nrows); m += 2) {
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (m < nrows) {
        fetch_rows(rows + (m + kRowsAhead) * ld, kStep);
        fetch_rows(rows + (m + 1 + kRowsAhead) * ld, kStep);
        even = _mm512_loadu_si512(rows + m * ld);
        odd = _mm512_loadu_si512(rows + (m + 1) * ld);
      }
      _mm512_storeu_si512(out + m * kGroup, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(second + m * kGroup, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
