// Multiply-adds that touch registers alone: what no kernel of this processor can outrun. Compiled for the processor
// that it runs on; each function runs `rounds` of independent products and returns their FLOP, or 0 where there is no
// instruction.

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Keeps values in registers, and the compiler from knowing them.
template <typename Vector>
void hide(Vector& value) {
#if defined(__AVX2__) || defined(__AVX512F__)
  asm volatile("" : "+v"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

// `product` adds to a sum; kSums of them hide an instruction's latency. Loops over them are unrolled, which keeps them
// in registers.
template <int kSums, typename Vector, typename F>
inline __attribute__((always_inline)) void run(int64_t rounds, Vector zero, F product) {
  Vector sums[kSums];
#pragma GCC unroll 32
  for (int s = 0; s < kSums; ++s) sums[s] = zero, hide(sums[s]);  // no two are known to be the same
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int s = 0; s < kSums; ++s) sums[s] = product(sums[s]);
  }
#pragma GCC unroll 32
  for (int s = 0; s < kSums; ++s) hide(sums[s]);
}

}  // namespace

extern "C" {

double fma_float32(int64_t rounds) {
#if defined(__AVX512F__)
  __m512 a = _mm512_setzero_ps(), b = a;
  hide(a), hide(b);
  run<24>(rounds, a, [=](__m512 sum) { return _mm512_fmadd_ps(a, b, sum); });
  return 24.0 * 16 * 2 * static_cast<double>(rounds);
#elif defined(__FMA__)
  __m256 a = _mm256_setzero_ps(), b = a;
  hide(a), hide(b);
  run<12>(rounds, a, [=](__m256 sum) { return _mm256_fmadd_ps(a, b, sum); });
  return 12.0 * 8 * 2 * static_cast<double>(rounds);
#else
  return 0;
#endif
}

double fma_float64(int64_t rounds) {
#if defined(__AVX512F__)
  __m512d a = _mm512_setzero_pd(), b = a;
  hide(a), hide(b);
  run<24>(rounds, a, [=](__m512d sum) { return _mm512_fmadd_pd(a, b, sum); });
  return 24.0 * 8 * 2 * static_cast<double>(rounds);
#elif defined(__FMA__)
  __m256d a = _mm256_setzero_pd(), b = a;
  hide(a), hide(b);
  run<12>(rounds, a, [=](__m256d sum) { return _mm256_fmadd_pd(a, b, sum); });
  return 12.0 * 4 * 2 * static_cast<double>(rounds);
#else
  return 0;
#endif
}

double dot_bfloat16(int64_t rounds) {
#if defined(__AVX512BF16__)
  __m512 zero = _mm512_setzero_ps();
  hide(zero);
  __m512bh a = (__m512bh)zero, b = a;
  run<24>(rounds, zero, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, a, b); });
  return 24.0 * 32 * 2 * static_cast<double>(rounds);
#else
  return 0;
#endif
}

double tile_bfloat16(int64_t rounds) {
#if defined(__AMX_BF16__) && defined(__linux__)
  constexpr int kPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kPermission, kTileData) != 0) return 0;
  alignas(64) uint8_t config[64] = {1};  // eight tiles of 16 rows of 64 bytes
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 16 * 16 * 32 * 2 * static_cast<double>(rounds);
#else
  return 0;
#endif
}

}  // extern "C"
