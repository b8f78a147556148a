// Integer vectors, transposition and ranks for the vector kernels of index_select. Only *_cpu.cc
// files may include it. A rank is a score as a signed integer of the same order.
#pragma once

#include "ops/kit/vec.h"

namespace indexcache {
namespace INDEXCACHE_ISA {

namespace {

#if defined(__AVX512F__)

using IVec = __m512i;
INDEXCACHE_INLINE IVec ivec_load(const int32_t* p) { return _mm512_loadu_si512(p); }
INDEXCACHE_INLINE void ivec_store(int32_t* p, IVec v) { _mm512_storeu_si512(p, v); }
INDEXCACHE_INLINE IVec ivec_set(int32_t x) { return _mm512_set1_epi32(x); }
INDEXCACHE_INLINE IVec ivec_add(IVec a, IVec b) { return _mm512_add_epi32(a, b); }
INDEXCACHE_INLINE IVec ivec_min(IVec a, IVec b) { return _mm512_min_epi32(a, b); }
INDEXCACHE_INLINE IVec ivec_max(IVec a, IVec b) { return _mm512_max_epi32(a, b); }
INDEXCACHE_INLINE IVec ivec_iota() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INDEXCACHE_INLINE uint32_t ivec_gt(IVec a, IVec b) { return _mm512_cmpgt_epi32_mask(a, b); }
INDEXCACHE_INLINE uint32_t ivec_eq(IVec a, IVec b) { return _mm512_cmpeq_epi32_mask(a, b); }
// count + 1 in the lanes where a > b
INDEXCACHE_INLINE IVec ivec_count_gt(IVec count, IVec a, IVec b) {
  return _mm512_mask_add_epi32(count, _mm512_cmpgt_epi32_mask(a, b), count, _mm512_set1_epi32(1));
}
// The lanes of `mask` first, in order; what follows them is undefined.
INDEXCACHE_INLINE IVec ivec_compress(uint32_t mask, IVec v) {
  return _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), v);
}
INDEXCACHE_INLINE IVec vec_rank(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}
INDEXCACHE_INLINE Vec vec_from_bits(IVec v) { return _mm512_castsi512_ps(v); }
INDEXCACHE_INLINE IVec vec_to_bits(Vec v) { return _mm512_castps_si512(v); }

// rows[i] lane j <-> rows[j] lane i
INDEXCACHE_INLINE void transpose(IVec (&rows)[16]) {
  IVec t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // rows[4 a + c] now holds columns c, 4 + c, 8 + c, 12 + c of rows 4a..4a+3, one in each 128-bit
  // part.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xDD);
    t[8 + c] = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xDD);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xDD);
    rows[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xDD);
  }
}

#else

using IVec = __m256i;
INDEXCACHE_INLINE IVec ivec_load(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
INDEXCACHE_INLINE void ivec_store(int32_t* p, IVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
INDEXCACHE_INLINE IVec ivec_set(int32_t x) { return _mm256_set1_epi32(x); }
INDEXCACHE_INLINE IVec ivec_add(IVec a, IVec b) { return _mm256_add_epi32(a, b); }
INDEXCACHE_INLINE IVec ivec_min(IVec a, IVec b) { return _mm256_min_epi32(a, b); }
INDEXCACHE_INLINE IVec ivec_max(IVec a, IVec b) { return _mm256_max_epi32(a, b); }
INDEXCACHE_INLINE IVec ivec_iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
INDEXCACHE_INLINE uint32_t lane_mask(IVec v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v)));
}
INDEXCACHE_INLINE uint32_t ivec_gt(IVec a, IVec b) { return lane_mask(_mm256_cmpgt_epi32(a, b)); }
INDEXCACHE_INLINE uint32_t ivec_eq(IVec a, IVec b) { return lane_mask(_mm256_cmpeq_epi32(a, b)); }
INDEXCACHE_INLINE IVec ivec_count_gt(IVec count, IVec a, IVec b) {
  return _mm256_sub_epi32(count, _mm256_cmpgt_epi32(a, b));
}

// For each mask of 8 lanes, their indices in order.
struct CompressTable {
  uint8_t lanes[256][8];
};
constexpr CompressTable make_compress_table() {
  CompressTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    int n = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) table.lanes[mask][n++] = static_cast<uint8_t>(lane);
    }
  }
  return table;
}
constexpr CompressTable kCompress = make_compress_table();

INDEXCACHE_INLINE IVec ivec_compress(uint32_t mask, IVec v) {
  const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[mask]));
  return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(lanes));
}
INDEXCACHE_INLINE IVec vec_rank(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
}
INDEXCACHE_INLINE Vec vec_from_bits(IVec v) { return _mm256_castsi256_ps(v); }
INDEXCACHE_INLINE IVec vec_to_bits(Vec v) { return _mm256_castps_si256(v); }

INDEXCACHE_INLINE void transpose(IVec (&rows)[8]) {
  IVec t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 4; ++c) {
    const IVec low = rows[c], high = rows[4 + c];
    rows[c] = _mm256_permute2x128_si256(low, high, 0x20);
    rows[4 + c] = _mm256_permute2x128_si256(low, high, 0x31);
  }
}

#endif

// kLanes integers as f32.
INDEXCACHE_INLINE Vec vec_load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#endif
}

// The rank of a score: NaN counts as -infinity, and -0 equals +0.
INDEXCACHE_INLINE IVec score_rank(Vec score) {
  return vec_rank(vec_add(vec_max(score, vec_set(-__builtin_inff())), vec_zero()));
}

}  // namespace
}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
