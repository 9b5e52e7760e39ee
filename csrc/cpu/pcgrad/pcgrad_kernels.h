// PCGrad's two passes over gradients. Both are bound by memory, so both compute in float64: products of float32 are
// exact there, and no gradient is too small or too large to be squared.
#pragma once

#include "pcgrad/pcgrad_args.h"
#include "simd/simd.h"

namespace mtlk {
namespace MTLK_ISA {

// Elements of storage type T as float64, whatever stands between.
template <typename T>
MTLK_INLINE void widen_to_double(const T* in, double* out, int64_t n) {
  if constexpr (sizeof(T) == 2) {
    constexpr int kStep = 64;
    alignas(64) float wide[kStep];
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t m = n - i < kStep ? n - i : kStep;
      widen(in + i, wide, m);
      for (int64_t k = 0; k < m; ++k) out[i + k] = wide[k];
    }
  } else {
    widen(in, out, n);
  }
}

template <typename T>
class GramPiece {
 public:
  static int64_t bytes(int count) {
    return Arena::bytes<double>(padded_tasks(count) * row_size(count)) +
           Arena::bytes<Vector<double>>(tiles(count) * kTile * kTile);
  }

  GramPiece(const PcgradPiece& piece, void* memory)
      : piece_(piece),
        rows_(padded_tasks(piece.count)),
        columns_(columns_for(piece.count)),
        ld_(row_size(piece.count)) {
    Arena arena(memory);
    values_ = arena.take<double>(rows_ * ld_);
    sums_ = arena.take<Vector<double>>(tiles(piece.count) * kTile * kTile);
  }

  void run(double* products) {
    std::memset(values_, 0, rows_ * ld_ * sizeof(double));
    std::memset(sums_, 0, tiles(piece_.count) * kTile * kTile * sizeof(Vector<double>));
    for (int64_t first = 0; first < piece_.elements; first += columns_) add(first);
    for (int i = 0; i < piece_.count; ++i) {
      for (int j = i; j < piece_.count; ++j) products[i * piece_.count + j] = total(i, j);
    }
  }

 private:
  // Products are computed in tiles of tasks, as many as stay in registers.
  static constexpr int kTile = 4;
  static constexpr int kHalf = kRegisters >= 32 ? kTile : kTile / 2;
  static constexpr int kLanes = Simd<double>::lanes;
  // Values of all tasks that are worked on together: a third of a first-level cache, as the next ones pass through it.
  static constexpr int64_t kValues = 2048;

  static int padded_tasks(int count) { return (count + kTile - 1) / kTile * kTile; }
  static int64_t columns_for(int count) {
    const int64_t columns = kValues / padded_tasks(count) / kLanes * kLanes;
    return columns < 8 * kLanes ? 8 * kLanes : columns;
  }
  // Rows a power of two apart would share their places in the first-level cache.
  static int64_t row_size(int count) { return columns_for(count) + kLanes; }
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
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    for (int t = 0; t < piece_.count; ++t) {
      double* row = values_ + t * ld_;
      widen_to_double(grad(t) + first, row, n);
      for (int64_t i = n; i < padded; ++i) row[i] = 0;
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
    const double* left = values_ + a * kTile * ld_;
    const double* right = values_ + (b * kTile + half) * ld_;
    Vector<double>* sums = sums_ + tile(a, b) * kTile * kTile + half;
    Vector<double> acc[kTile][kHalf];
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kHalf; ++j) acc[i][j] = sums[i * kTile + j];
    }
    for (int64_t k = 0; k < n; k += kLanes) {
      for (int i = 0; i < kTile; ++i) __builtin_prefetch(coming.rows[i] + k, 0, 2);
      Vector<double> row[kTile];
      for (int i = 0; i < kTile; ++i) row[i] = load(left + i * ld_ + k);
#pragma GCC unroll 4
      for (int j = 0; j < kHalf; ++j) {
        const Vector<double> column = load(right + j * ld_ + k);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
          if (!Diagonal || kHalf < kTile || i <= j) acc[i][j] += row[i] * column;
        }
      }
    }
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kHalf; ++j) sums[i * kTile + j] = acc[i][j];
    }
  }

  double total(int i, int j) const {
    const Vector<double> sum = sums_[tile(i / kTile, j / kTile) * kTile * kTile + i % kTile * kTile + j % kTile];
    double value = 0;
    for (int lane = 0; lane < kLanes; ++lane) value += sum[lane];
    return value;
  }

  const PcgradPiece& piece_;
  const int rows_;
  const int64_t columns_, ld_;
  double* values_;
  Vector<double>* sums_;
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

// As many elements as make a vector of float64, in float64.
template <typename T>
MTLK_INLINE Vector<double> load_double(const T* p) {
  constexpr int kLanes = Simd<double>::lanes;
  if constexpr (__is_same(T, double)) {
    return load(p);
  } else {
    typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
    Narrow values;
    if constexpr (__is_same(T, float)) {
      std::memcpy(&values, p, sizeof(values));
    } else {
      float wide[kLanes];
      for (int i = 0; i < kLanes; ++i) wide[i] = to_compute(p[i]);
      std::memcpy(&values, wide, sizeof(values));
    }
    return __builtin_convertvector(values, Vector<double>);
  }
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
  return {GramPiece<T>::bytes,
          [](const PcgradPiece& piece, double* products, void* scratch) { GramPiece<T>(piece, scratch).run(products); },
          [](const PcgradPiece& piece, const double* coefficients, void* out, bool past) {
            combine_piece(piece, coefficients, static_cast<T*>(out), past);
          }};
}

}  // namespace MTLK_ISA
}  // namespace mtlk
