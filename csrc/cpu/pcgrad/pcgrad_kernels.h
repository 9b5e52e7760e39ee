// PCGrad's two passes over gradients, as fast as memory gives them.
#pragma once

#include <type_traits>

#include "pcgrad/pcgrad_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// As many elements as make a vector of float64, in float64.
template <typename T>
MTLK_INLINE Vector<double> load_double(const T* p) {
  if constexpr (__is_same(T, double)) {
    return load(p);
  } else if constexpr (__is_same(T, float)) {
    typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
    Narrow values;
    std::memcpy(&values, p, sizeof(values));
    return __builtin_convertvector(values, Vector<double>);
  } else {
#if defined(__AVX512F__)
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(T, Half)) return _mm512_cvtps_pd(_mm256_cvtph_ps(raw));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
#elif defined(__AVX2__)
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(T, Half)) return _mm256_cvtps_pd(_mm_cvtph_ps(raw));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16)));
#else
    float wide[Simd<double>::lanes];
    for (int i = 0; i < Simd<double>::lanes; ++i) wide[i] = to_compute(p[i]);
    return load_double(wide);
#endif
  }
}

template <typename T>
MTLK_INLINE void widen_to_double(const T* in, double* out, int64_t n) {
  constexpr int kLanes = Simd<double>::lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_double(in + i));
  for (; i < n; ++i) out[i] = to_compute(in[i]);
}

// Products of vectors of elements, added up in vectors of sums. In float32 each addition rounds, so that only kSteps of
// them follow each other before float64 takes over: a sum is then off by at most 16 * 2^-24 of the size of its terms,
// which is less than 1e-6. In float64 alone they take twice as many instructions.
template <typename C>
struct PlainProducts {
  using Element = C;
  using Sum = C;
  using Elements = Vector<C>;
  static constexpr int kElements = Simd<C>::lanes;
  static constexpr int64_t kSteps = __is_same(C, float) ? 16 : int64_t{1} << 32;

  static MTLK_INLINE Elements load(const Element* p) { return mtlk::MTLK_ISA::load(p); }
  static MTLK_INLINE Vector<Sum> add(Vector<Sum> sum, Elements a, Elements b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two products a step, and each is an addition.
struct DotProducts {
  using Element = BFloat16;
  using Sum = float;
  using Elements = __m512bh;
  static constexpr int kElements = 32;
  static constexpr int64_t kSteps = 8;

  static MTLK_INLINE Elements load(const Element* p) {
    Elements elements;
    std::memcpy(&elements, p, sizeof(elements));
    return elements;
  }
  static MTLK_INLINE Vector<Sum> add(Vector<Sum> sum, Elements a, Elements b) {
    return reinterpret_cast<Vector<Sum>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
};
#endif

// What is tried first, see held_in_float.
template <typename T>
struct ProductsOf {
  using type = PlainProducts<Compute<T>>;
};
#if defined(__AVX512BF16__)
template <>
struct ProductsOf<BFloat16> {
  using type = DotProducts;
};
#endif

template <typename T, typename Products>
class GramPiece {
  using Element = typename Products::Element;
  using Sum = typename Products::Sum;

 public:
  static int64_t bytes(int count) {
    return Arena::bytes<Element>(padded_tasks(count) * row_size(count)) +
           Arena::bytes<const Element*>(padded_tasks(count)) +
           Arena::bytes<Vector<double>>(tiles(count) * kTile * kTile);
  }

  GramPiece(const PcgradPiece& piece, void* memory)
      : piece_(piece),
        rows_(padded_tasks(piece.count)),
        columns_(columns_for(piece.count)),
        ld_(row_size(piece.count)) {
    Arena arena(memory);
    values_ = arena.take<Element>(rows_ * ld_);
    row_ = arena.take<const Element*>(rows_);
    sums_ = arena.take<Vector<double>>(tiles(piece.count) * kTile * kTile);
  }

  void run(double* products) {
    std::memset(static_cast<void*>(values_), 0, rows_ * ld_ * sizeof(Element));
    std::memset(sums_, 0, tiles(piece_.count) * kTile * kTile * sizeof(Vector<double>));
    for (int t = 0; t < rows_; ++t) row_[t] = values_ + t * ld_;
    for (int64_t first = 0; first < piece_.elements; first += columns_) add(first);
    for (int i = 0; i < piece_.count; ++i) {
      for (int j = i; j < piece_.count; ++j) products[i * piece_.count + j] = total(i, j);
    }
  }

 private:
  // Products are computed in tiles of tasks, as many as stay in registers.
  static constexpr int kTile = 4;
  static constexpr int kHalf = kRegisters >= 32 ? kTile : kTile / 2;
  static constexpr int64_t kStep = Products::kElements;
  // Values of all tasks that are worked on together: a part of a first-level cache, as the next ones pass through it.
  static constexpr int64_t kValues = 16384 / sizeof(Element);

  static int padded_tasks(int count) { return (count + kTile - 1) / kTile * kTile; }
  static int64_t columns_for(int count) {
    const int64_t columns = kValues / padded_tasks(count) / kStep * kStep;
    return columns < 8 * kStep ? 8 * kStep : columns;
  }
  // Rows a power of two apart would share their places in the first-level cache.
  static int64_t row_size(int count) { return columns_for(count) + kStep; }
  static int tiles(int count) {
    const int side = padded_tasks(count) / kTile;
    return side * (side + 1) / 2;
  }
  // Tiles on and above the diagonal, row by row.
  int tile(int a, int b) const {
    const int side = rows_ / kTile;
    return a * side - a * (a - 1) / 2 + b - a;
  }

  void add(int64_t first) {
    const int64_t n = piece_.elements - first < columns_ ? piece_.elements - first : columns_;
    const int64_t padded = (n + kStep - 1) / kStep * kStep;
    for (int t = 0; t < piece_.count; ++t) {
      if constexpr (__is_same(T, Element)) {
        row_[t] = grad(t) + first;
        if (n == padded) continue;
        std::memcpy(values_ + t * ld_, grad(t) + first, n * sizeof(T));
      } else if constexpr (__is_same(Element, double)) {
        widen_to_double(grad(t) + first, values_ + t * ld_, n);
      } else {
        widen(grad(t) + first, values_ + t * ld_, n);
      }
      std::memset(static_cast<void*>(values_ + t * ld_ + n), 0, (padded - n) * sizeof(Element));
      row_[t] = values_ + t * ld_;
    }
    const int side = rows_ / kTile, count = tiles(piece_.count);
    int done = 0;
    for (int a = 0; a < side; ++a) {
      for (int b = a; b < side; ++b, ++done) {
        const Coming coming(*this, piece_.count * done / count, piece_.count * (done + 1) / count, first + n);
        for (int half = 0; half < kTile; half += kHalf) {
          a == b ? multiply<true>(a, b, half, padded, coming) : multiply<false>(a, b, half, padded, coming);
        }
      }
    }
  }

  // The next columns of the gradients of tasks [from, to), which are fetched while the present ones are multiplied.
  struct Coming {
    Coming(const GramPiece& piece, int from, int to, int64_t next) {
      for (int i = 0; i < kTile; ++i) {
        const int t = from + i < to ? from + i : to > from ? to - 1 : 0;
        rows[i] = piece.grad(t) + (to > from ? next : 0);
      }
    }
    const T* rows[kTile];
  };

  const T* grad(int t) const { return static_cast<const T*>(piece_.grads[t]) + piece_.first; }

  // Adds the products of tile (a, b), of kHalf of its columns.
  template <bool Diagonal>
  void multiply(int a, int b, int half, int64_t n, const Coming& coming) {
    const Element *left[kTile], *right[kHalf];
    for (int i = 0; i < kTile; ++i) left[i] = row_[a * kTile + i];
    for (int j = 0; j < kHalf; ++j) right[j] = row_[b * kTile + half + j];
    Vector<double>* const sums = sums_ + tile(a, b) * kTile * kTile + half;
    for (int64_t begin = 0; begin < n;) {
      const int64_t end = n - begin < Products::kSteps * kStep ? n : begin + Products::kSteps * kStep;
      Vector<Sum> acc[kTile][kHalf] = {};
      for (int64_t k = begin; k < end; k += kStep) {
        for (int i = 0; i < kTile; ++i) __builtin_prefetch(coming.rows[i] + k, 0, 2);
        typename Products::Elements row[kTile];
        for (int i = 0; i < kTile; ++i) row[i] = Products::load(left[i] + k);
#pragma GCC unroll 4
        for (int j = 0; j < kHalf; ++j) {
          const auto column = Diagonal && kHalf == kTile ? row[j] : Products::load(right[j] + k);
#pragma GCC unroll 4
          for (int i = 0; i < kTile; ++i) {
            if (!Diagonal || kHalf < kTile || i <= j) acc[i][j] = Products::add(acc[i][j], row[i], column);
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kHalf; ++j) {
          if (!Diagonal || kHalf < kTile || i <= j) sums[i * kTile + j] += in_double(acc[i][j]);
        }
      }
      begin = end;
    }
  }

  static MTLK_INLINE Vector<double> in_double(Vector<Sum> sum) {
    if constexpr (__is_same(Sum, double)) {
      return sum;
    } else {
#if defined(__AVX512F__)
      const auto all = reinterpret_cast<__m512d>(sum);
      const __m256d low = _mm512_castpd512_pd256(all), high = _mm512_extractf64x4_pd(all, 1);
      return _mm512_cvtps_pd(_mm256_castpd_ps(low)) + _mm512_cvtps_pd(_mm256_castpd_ps(high));
#elif defined(__AVX2__)
      const auto all = reinterpret_cast<__m256>(sum);
      return _mm256_cvtps_pd(_mm256_castps256_ps128(all)) + _mm256_cvtps_pd(_mm256_extractf128_ps(all, 1));
#else
      alignas(64) float lanes[Simd<float>::lanes];
      store(lanes, sum);
      return load_double(lanes) + load_double(lanes + Simd<double>::lanes);
#endif
    }
  }

  double total(int i, int j) const {
    const Vector<double> sum = sums_[tile(i / kTile, j / kTile) * kTile * kTile + i % kTile * kTile + j % kTile];
    double value = 0;
    for (int lane = 0; lane < Simd<double>::lanes; ++lane) value += sum[lane];
    return value;
  }

  const PcgradPiece& piece_;
  const int rows_;
  const int64_t columns_, ld_;
  Element* values_;
  const Element** row_;  // where each task's values are
  Vector<double>* sums_;
};

// Whether float32 held the squares: each task's sum is finite, and so large that squares which are too small, or
// flushed to zero, are less than 1e-8 of it; or all elements are zeros.
template <typename T>
bool held_in_float(const PcgradPiece& piece, const double* products) {
  const double least = static_cast<double>(piece.elements) * 0x1p-99;
  for (int i = 0; i < piece.count; ++i) {
    const double squares = products[i * piece.count + i];
    if (!std::isfinite(squares)) return false;
    if (squares >= least) continue;
    const T* const grad = static_cast<const T*>(piece.grads[i]) + piece.first;
    using Word = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    Word bits = 0;
    for (int64_t k = 0; k < piece.elements; ++k) bits |= bits_of<Word>(grad[k]);
    if (bits != 0) return false;
  }
  return true;
}

template <typename T>
struct Gram {
  using Products = typename ProductsOf<T>::type;
  using Wide = GramPiece<T, PlainProducts<double>>;
  using Fast = GramPiece<T, Products>;

  static int64_t bytes(int count) {
    const int64_t fast = Fast::bytes(count), wide = Wide::bytes(count);
    return fast > wide ? fast : wide;
  }
  static void run(const PcgradPiece& piece, double* products, void* scratch) {
    Fast(piece, scratch).run(products);
    if constexpr (!__is_same(typename Products::Sum, double)) {
      if (!held_in_float<T>(piece, products)) Wide(piece, scratch).run(products);
    }
  }
};

// Rounds sums to the storage type, past the caches where that is asked for and whole vectors allow it.
template <typename T>
MTLK_INLINE void write(const double* sums, int64_t n, T* out, bool past) {
  constexpr int64_t kMost = 64;
  alignas(64) T rounded[kMost];
  const bool whole = past && can_go_past_caches(out, n);
  T* target = whole ? rounded : out;
  if constexpr (sizeof(T) == 2) {
    alignas(64) float singles[kMost];
    for (int64_t i = 0; i < n; ++i) singles[i] = static_cast<float>(sums[i]);
    narrow(singles, target, n);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(sums[i]);
  }
  for (int64_t i = 0; whole && i < n; i += kPerVector<T>) bytes_past_caches(out + i, rounded + i);
}

template <typename T>
void combine_piece(const PcgradPiece& piece, const double* coefficients, T* out, bool past) {
  constexpr int kLanes = Simd<double>::lanes, kVectors = 8;
  constexpr int64_t kColumns = kVectors * kLanes;
  // How far ahead gradients are fetched: a dozen streams are too many for the hardware's prefetchers.
  constexpr int64_t kAhead = 2048;
  int64_t first = piece.first;
  const int64_t last = first + piece.elements;
  for (; first + kColumns <= last; first += kColumns) {
    Vector<double> sums[kVectors] = {};
    for (int t = 0; t < piece.count; ++t) {
      const T* grad = static_cast<const T*>(piece.grads[t]) + first;
      const Vector<double> c = broadcast(coefficients[t]);
      for (int64_t line = 0; line < kColumns * static_cast<int64_t>(sizeof(T)); line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(grad) + kAhead + line, 0, 2);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[v] += c * load_double(grad + v * kLanes);
    }
    alignas(64) double wide[kColumns];
    for (int v = 0; v < kVectors; ++v) store(wide + v * kLanes, sums[v]);
    write(wide, kColumns, out + first, past);
  }
  for (; first < last; ++first) {
    double sum = 0;
    for (int t = 0; t < piece.count; ++t) {
      sum += coefficients[t] * to_compute(static_cast<const T*>(piece.grads[t])[first]);
    }
    write(&sum, 1, out + first, false);
  }
  if (past) fence_past_caches();
}

template <typename T>
PcgradKernels pcgrad_kernels() {
  return {Gram<T>::bytes, Gram<T>::run, [](const PcgradPiece& piece, const double* coefficients, void* out, bool past) {
            combine_piece(piece, coefficients, static_cast<T*>(out), past);
          }};
}

}  // namespace MTLK_ISA
}  // namespace mtlk
