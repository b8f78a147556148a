// The vectors of the instruction set that this file is compiled for (see ops/kit/isa.h). Everything
// is static and forced inline, in the namespace of the instruction set.
//
//   kLanes   float32 lanes of a Vec: 8 with AVX2, 16 with AVX-512
//   kHasDot  vdpbf16ps is there: acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1] on bf16 pairs
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#ifndef INDEXCACHE_ISA
#error "only *_cpu.cc files, compiled once per instruction set, may include ops/kit/vec.h"
#endif

#define INDEXCACHE_INLINE static inline __attribute__((always_inline))

namespace indexcache {
namespace INDEXCACHE_ISA {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

INDEXCACHE_INLINE Vec vec_zero() { return _mm512_setzero_ps(); }
INDEXCACHE_INLINE Vec vec_set(float x) { return _mm512_set1_ps(x); }
INDEXCACHE_INLINE Vec vec_load(const float* p) { return _mm512_loadu_ps(p); }
INDEXCACHE_INLINE void vec_store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
INDEXCACHE_INLINE Vec vec_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INDEXCACHE_INLINE Vec vec_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INDEXCACHE_INLINE Vec vec_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INDEXCACHE_INLINE Vec vec_div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
INDEXCACHE_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
INDEXCACHE_INLINE Vec vec_max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}  // b where either is NaN
INDEXCACHE_INLINE Vec vec_min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// `a` in lanes where v < 0, else `b`.
INDEXCACHE_INLINE Vec vec_select_negative(Vec v, Vec a, Vec b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ), a);
}
INDEXCACHE_INLINE float vec_sum(Vec v) { return _mm512_reduce_add_ps(v); }
// Lane i is vec_sum(v[i]), bit for bit, at a third of the instructions: each level halves the
// number of vectors.
INDEXCACHE_INLINE Vec vec_sums(const Vec (&v)[16]) {
  const auto halves = [](Vec a, Vec b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const auto quarters = [&](Vec a, Vec b, Vec c, Vec d) __attribute__((always_inline)) {
    const Vec x = halves(a, b), y = halves(c, d);
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  };
  const auto pairs = [](Vec a, Vec b) __attribute__((always_inline)) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const Vec x = pairs(quarters(v[0], v[4], v[8], v[12]), quarters(v[1], v[5], v[9], v[13]));
  const Vec y = pairs(quarters(v[2], v[6], v[10], v[14]), quarters(v[3], v[7], v[11], v[15]));
  return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xDD));
}
INDEXCACHE_INLINE float vec_max_lane(Vec v) { return _mm512_reduce_max_ps(v); }
INDEXCACHE_INLINE Vec vec_load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INDEXCACHE_INLINE Vec vec_load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INDEXCACHE_INLINE void vec_store_bf16(uint16_t* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

#else

constexpr int kLanes = 8;
using Vec = __m256;

INDEXCACHE_INLINE Vec vec_zero() { return _mm256_setzero_ps(); }
INDEXCACHE_INLINE Vec vec_set(float x) { return _mm256_set1_ps(x); }
INDEXCACHE_INLINE Vec vec_load(const float* p) { return _mm256_loadu_ps(p); }
INDEXCACHE_INLINE void vec_store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
INDEXCACHE_INLINE Vec vec_add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INDEXCACHE_INLINE Vec vec_sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INDEXCACHE_INLINE Vec vec_mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INDEXCACHE_INLINE Vec vec_div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
INDEXCACHE_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INDEXCACHE_INLINE Vec vec_max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
INDEXCACHE_INLINE Vec vec_min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
INDEXCACHE_INLINE Vec vec_select_negative(Vec v, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
}
INDEXCACHE_INLINE float vec_sum(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
// See above.
INDEXCACHE_INLINE Vec vec_sums(const Vec (&v)[8]) {
  const auto halves = [](Vec a, Vec b) __attribute__((always_inline)) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto pairs = [](Vec a, Vec b) __attribute__((always_inline)) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  };
  const Vec x = pairs(halves(v[0], v[4]), halves(v[1], v[5]));
  const Vec y = pairs(halves(v[2], v[6]), halves(v[3], v[7]));
  return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xDD));
}
INDEXCACHE_INLINE float vec_max_lane(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INDEXCACHE_INLINE Vec vec_load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INDEXCACHE_INLINE Vec vec_load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INDEXCACHE_INLINE void vec_store_bf16(uint16_t* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

#endif

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
// acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1]; a, b hold 16 pairs of bf16.
INDEXCACHE_INLINE Vec vec_dot_bf16(Vec acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
// One pair of bf16 at p in every lane.
INDEXCACHE_INLINE __m512i vec_broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return _mm512_set1_epi32(pair);
}
#else
constexpr bool kHasDot = false;
#endif

// exp(x) for x <= 0, relative error below 2^-22; exactly 0 for -infinity and below -87.3; NaN stays
// NaN. 2^n * p(r) with n = round(x / ln 2) and a degree-6 polynomial on |r| <= ln 2 / 2.
INDEXCACHE_INLINE Vec vec_exp(Vec x) {
  const Vec clamped = vec_max(vec_set(-87.33654f), x);  // NaN: vec_max gives its second operand
#if defined(__AVX512F__)
  const Vec n =
      _mm512_roundscale_ps(vec_mul(clamped, vec_set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec n = _mm256_round_ps(vec_mul(clamped, vec_set(1.44269504f)),
                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  Vec r = vec_fma(n, vec_set(-0.693359375f), clamped);
  r = vec_fma(n, vec_set(2.12194440e-4f), r);
  Vec p = vec_set(1.9875691500e-4f);
  p = vec_fma(p, r, vec_set(1.3981999507e-3f));
  p = vec_fma(p, r, vec_set(8.3334519073e-3f));
  p = vec_fma(p, r, vec_set(4.1665795894e-2f));
  p = vec_fma(p, r, vec_set(1.6666665459e-1f));
  p = vec_fma(p, r, vec_set(5.0000001201e-1f));
  p = vec_add(vec_fma(vec_mul(p, r), r, r), vec_set(1.0f));
#if defined(__AVX512F__)
  const Vec y = _mm512_scalef_ps(p, n);
  const __mmask16 keep = _mm512_cmp_ps_mask(x, vec_set(-87.3f), _CMP_NLT_UQ);
  return _mm512_maskz_mov_ps(keep, y);
#else
  const __m256i power =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const Vec y = vec_mul(p, _mm256_castsi256_ps(power));
  const Vec keep = _mm256_cmp_ps(x, vec_set(-87.3f), _CMP_NLT_UQ);
  const Vec nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_and_ps(y, keep), x, nan);
#endif
}

}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
