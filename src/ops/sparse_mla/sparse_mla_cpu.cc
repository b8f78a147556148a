// Both products read the gathered rows as they lie in the cache.
//
// Scores: the lanes are heads. q is transposed once into panels [step][heads], where a step is four
// bytes of a row: one f32 or a pair of bf16. A step of a row is broadcast against the panel, so no
// key is transposed or copied.
//
// Values: the lanes are value dimensions and the weights are broadcast. With bf16, two rows are
// interleaved in registers so that a pair holds one dimension of two rows; the order of lanes that
// this leaves is undone when `out` is written.
//
// Blocks of rows are small enough that the second product finds them in the L2 cache. The softmax
// runs online from block to block, and the next block is prefetched while the values of this one
// are added.
#include "ops/sparse_mla/sparse_mla_cpu.h"

#include "ops/kit/vec.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand inside its own shuffle intrinsics for a mistake (GCC bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace indexcache::INDEXCACHE_ISA {

namespace {

// 128 rows of a large model (576 bf16) are 144 KiB: beside the panel and the sums they stay in an
// L2 cache of 1 MiB.
constexpr int64_t kBlock = 128;
constexpr int kTileRows = 12;                     // rows of one score tile
constexpr int kTileSteps = kLanes == 16 ? 4 : 2;  // see score_tile
constexpr int kTileHeads = kLanes == 16 ? 8 : 4;  // heads of one value tile
constexpr int64_t kChunk = 2 * kLanes;            // value dimensions of one value tile
constexpr int64_t kLineBytes = 64;
constexpr float kLowest = -3.40282347e38f;

INDEXCACHE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INDEXCACHE_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The first n floats; zeros behind them. n may be anything.
INDEXCACHE_INLINE Vec load_first(const float* p, int64_t n) {
  if (n >= kLanes) return vec_load(p);
  if (n <= 0) return vec_zero();
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
#endif
}

INDEXCACHE_INLINE void store_first(float* p, Vec v, int64_t n) {
  if (n >= kLanes) return vec_store(p, v);
  if (n <= 0) return;
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane), v);
#endif
}

// Four bytes in every lane. As integers, because Zen 4 broadcasts these without a floating-point
// unit.
INDEXCACHE_INLINE Vec vec_broadcast(const void* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
#else
  return _mm256_castsi256_ps(_mm256_set1_epi32(bits));
#endif
}

// The lanes of a score tile: a whole vector of heads, or with AVX-512 half of one for a remainder
// of at most 8 heads, which the CPU multiplies in less time.
struct Whole {
  using V = Vec;
  static constexpr int kWidth = kLanes;
  INDEXCACHE_INLINE V set(float x) { return vec_set(x); }
  INDEXCACHE_INLINE V broadcast(const void* p) { return vec_broadcast(p); }
  INDEXCACHE_INLINE V load(const float* p) { return vec_load(p); }
  INDEXCACHE_INLINE void store(float* p, V v) { vec_store(p, v); }
  INDEXCACHE_INLINE V mul(V a, V b) { return vec_mul(a, b); }
  INDEXCACHE_INLINE V fma(V a, V b, V c) { return vec_fma(a, b, c); }
};

#if defined(__AVX512F__)
struct Half {
  using V = __m256;
  static constexpr int kWidth = kLanes / 2;
  INDEXCACHE_INLINE V set(float x) { return _mm256_set1_ps(x); }
  INDEXCACHE_INLINE V broadcast(const void* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return _mm256_castsi256_ps(_mm256_set1_epi32(bits));
  }
  INDEXCACHE_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  INDEXCACHE_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  INDEXCACHE_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  INDEXCACHE_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};
#endif

// acc + q * (four bytes of a row in every lane), where the broadcast serves one product only. Then
// it costs nothing as an operand of the instruction, a form that compilers do not find for
// vdpbf16ps.
template <class L, bool kPairs>
INDEXCACHE_INLINE typename L::V step_once(typename L::V acc, typename L::V q, const uint8_t* row) {
#if defined(__AVX512BF16__)
  struct FourBytes {
    uint8_t bytes[4];
  };
  if constexpr (kPairs) {
    const FourBytes* p = reinterpret_cast<const FourBytes*>(row);
    if constexpr (L::kWidth == 16) {
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(q), "m"(*p));
    } else {
      asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(acc) : "v"(q), "m"(*p));
    }
    return acc;
  }
#endif
  return L::fma(q, L::broadcast(row), acc);
}

INDEXCACHE_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[kLanes], u[kLanes];
#if defined(__AVX512F__)
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const Vec even0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const Vec even1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const Vec odd0 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xDD);
    const Vec odd1 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xDD);
    r[j] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[4 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(even0, even1, 0xDD);
    r[12 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
  }
#else
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
#endif
}

// kLanes steps of q; those past the end are zero.
template <bool kPairs>
INDEXCACHE_INLINE Vec load_steps(const float* q, int64_t step, int64_t row_elements) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    const int64_t i = 2 * step;
    const Vec low = load_first(q + i, row_elements - i);
    const Vec high = load_first(q + i + kLanes, row_elements - i - kLanes);
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
#endif
  return load_first(q + step, row_elements - step);
}

// Heads [head, head + width) of q as [step][width].
template <class L, bool kPairs>
void pack_panel(const SparseMlaSpan& span, int64_t head, int64_t steps, float* panel) {
  for (int64_t step = 0; step < steps; step += kLanes) {
    Vec v[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      v[i] = head + i < span.num_heads ? load_steps<kPairs>(span.q + (head + i) * span.row_elements,
                                                            step, span.row_elements)
                                       : vec_zero();
    }
    transpose(v);
    const int64_t n = min64(kLanes, steps - step);
    for (int64_t i = 0; i < n; ++i) store_first(panel + (step + i) * L::kWidth, v[i], L::kWidth);
  }
}

// scores[row][lane] = scale * <q, row>
template <class L, int kRows, bool kPairs>
void score_tile(const uint8_t* const* rows, const float* panel, int64_t steps, float scale,
                float* scores) {
  using V = typename L::V;
  V acc[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r] = L::set(0);
  int64_t byte = 0;
  // Several steps at once, because there are too few registers to keep the addresses of all rows.
  const auto advance = [&]<int kSteps>() __attribute__((always_inline)) {
    V q[kSteps];
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) q[i] = L::load(panel + i * L::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* row = rows[r] + byte;
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i) acc[r] = step_once<L, kPairs>(acc[r], q[i], row + 4 * i);
    }
    panel += kSteps * L::kWidth;
    byte += 4 * kSteps;
  };
  while (byte + 4 * kTileSteps <= 4 * steps) advance.template operator()<kTileSteps>();
  while (byte < 4 * steps) advance.template operator()<1>();
  const V scales = L::set(scale);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) L::store(scores + r * kLanes, L::mul(acc[r], scales));
}

// `rows` is readable, and `scores` writable, up to a multiple of 4 rows.
template <class L, bool kPairs>
void score_block(const uint8_t* const* rows, int64_t num_rows, const float* panel, int64_t steps,
                 float scale, float* scores) {
  int64_t r = 0;
  for (; r + kTileRows <= num_rows; r += kTileRows) {
    score_tile<L, kTileRows, kPairs>(rows + r, panel, steps, scale, scores + r * kLanes);
  }
  for (; r + 8 <= num_rows; r += 8) {
    score_tile<L, 8, kPairs>(rows + r, panel, steps, scale, scores + r * kLanes);
  }
  for (; r < num_rows; r += 4) {
    score_tile<L, 4, kPairs>(rows + r, panel, steps, scale, scores + r * kLanes);
  }
}

// Calls body.operator()<L>(head) for each group of heads. The panel of `head` starts head * steps
// floats into Scratch::panel.
template <class Body>
INDEXCACHE_INLINE void for_each_panel(int64_t num_heads, const Body& body) {
  for (int64_t head = 0; head < num_heads; head += kLanes) {
#if defined(__AVX512F__)
    if (num_heads - head <= kLanes / 2) {
      body.template operator()<Half>(head);
      continue;
    }
#endif
    body.template operator()<Whole>(head);
  }
}

#if defined(__AVX512BF16__)
// Lane i: (low[i], high[i]) as bf16.
INDEXCACHE_INLINE Vec bf16_pairs(Vec low, Vec high) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#endif

// Turns the scores of one group of heads into weights exp(a - max), in place. num_rows is even.
// `factor` is what sums over earlier blocks must be multiplied by.
template <bool kPairs>
void softmax_block(float* scores, int64_t num_rows, float* max, float* sum, float* factor) {
  const Vec old_max = vec_load(max);
  Vec max0 = old_max, max1 = old_max;
  for (int64_t r = 0; r < num_rows; r += 2) {
    max0 = vec_max(vec_load(scores + r * kLanes), max0);  // NaN leaves the maximum as it is
    max1 = vec_max(vec_load(scores + (r + 1) * kLanes), max1);
  }
  const Vec new_max = vec_max(max0, max1);
  const Vec rescale = vec_exp(vec_sub(old_max, new_max));
  Vec sum0 = vec_mul(vec_load(sum), rescale), sum1 = vec_zero();
  for (int64_t r = 0; r < num_rows; r += 2) {
    const Vec even = vec_exp(vec_sub(vec_load(scores + r * kLanes), new_max));
    const Vec odd = vec_exp(vec_sub(vec_load(scores + (r + 1) * kLanes), new_max));
    sum0 = vec_add(sum0, even);
    sum1 = vec_add(sum1, odd);
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      vec_store(scores + r / 2 * kLanes, bf16_pairs(even, odd));
      continue;
    }
#endif
    vec_store(scores + r * kLanes, even);
    vec_store(scores + (r + 1) * kLanes, odd);
  }
  vec_store(max, new_max);
  vec_store(sum, vec_add(sum0, sum1));
  vec_store(factor, rescale);
}

// acc + the product of one step: bf16 pairs or f32.
template <bool kPairs>
INDEXCACHE_INLINE Vec multiply_step(Vec acc, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#endif
  return vec_fma(a, b, acc);
}

struct ValueBlock {
  const uint8_t* const* rows;       // [num_rows], even
  const uint8_t* const* next_rows;  // to prefetch
  int64_t num_rows;
  int64_t row_bytes;
  bool first;  // `sums` holds nothing yet
};

// sums[head][kChunk] = sums * factor[head] + sum over rows of weights[row, head] * row[dims]. The
// dims start `byte` bytes into a row; n of them, at most kChunk, exist.
template <int kHeads, bool kPairs, bool kTail>
void value_tile(const ValueBlock& block, const float* weights, int64_t byte, int64_t n,
                int64_t prefetch_byte, const float* factor, float* sums) {
  Vec acc[kHeads][2];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) acc[h][0] = acc[h][1] = vec_zero();
  const uint8_t* const* rows = block.rows;
  const uint8_t* const* next = block.next_rows;
#if defined(__AVX512BF16__)
  const __mmask32 mask = n >= kChunk ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
#endif
  constexpr int kRowsPerStep = kPairs ? 2 : 1;
  for (int64_t r = 0; r < block.num_rows; r += kRowsPerStep) {
    Vec x[2];
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      const uint8_t *p = rows[r] + byte, *q = rows[r + 1] + byte;
      const __m512i a = kTail ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p);
      const __m512i b = kTail ? _mm512_maskz_loadu_epi16(mask, q) : _mm512_loadu_si512(q);
      x[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
      x[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
      _mm_prefetch(reinterpret_cast<const char*>(next[r + 1] + prefetch_byte), _MM_HINT_T1);
    }
#endif
    if constexpr (!kPairs) {
      const float* p = reinterpret_cast<const float*>(rows[r] + byte);
      x[0] = kTail ? load_first(p, n) : vec_load(p);
      x[1] = kTail ? load_first(p + kLanes, n - kLanes) : vec_load(p + kLanes);
    }
    _mm_prefetch(reinterpret_cast<const char*>(next[r] + prefetch_byte), _MM_HINT_T1);
    const float* w = weights + r / kRowsPerStep * kLanes;
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = vec_broadcast(w + h);
      acc[h][0] = multiply_step<kPairs>(acc[h][0], x[0], weight);
      acc[h][1] = multiply_step<kPairs>(acc[h][1], x[1], weight);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      float* to = sums + h * kChunk + i * kLanes;
      vec_store(to, block.first ? acc[h][i] : vec_fma(vec_load(to), vec_set(factor[h]), acc[h][i]));
    }
  }
}

// All heads for one chunk of dimensions. Each tile prefetches one cache line of every row of the
// next block.
template <bool kPairs, bool kTail>
INDEXCACHE_INLINE void value_chunk(const ValueBlock& block, int64_t num_heads, const float* weights,
                                   int64_t byte, int64_t n, int64_t prefetch_byte,
                                   int64_t prefetch_stride, const float* factor, float* sums) {
  int64_t head = 0;
  const auto tile = [&]<int kHeads>() {
    if (prefetch_byte >= block.row_bytes) prefetch_byte = 0;
    value_tile<kHeads, kPairs, kTail>(block,
                                      weights + head / kLanes * kBlock * kLanes + head % kLanes,
                                      byte, n, prefetch_byte, factor + head, sums + head * kChunk);
    head += kHeads;
    prefetch_byte += prefetch_stride;
  };
  while (num_heads - head >= kTileHeads) tile.template operator()<kTileHeads>();
  if constexpr (kTileHeads > 4) {
    if (num_heads - head >= 4) tile.template operator()<4>();
  }
  if (num_heads - head >= 2) tile.template operator()<2>();
  if (num_heads - head >= 1) tile.template operator()<1>();
}

struct Scratch {
  float* panel;    // [steps][heads]
  float* scores;   // [group][kBlock][kLanes], then the weights
  float* sums;     // [chunk][heads][kChunk]
  float* widened;  // [kBlock][row_elements], where bf16 rows are multiplied as f32
  float* max;      // [heads]
  float* sum;      // [heads]
  float* factor;   // [heads]
  size_t bytes;
};

Scratch lay_out(uint8_t* base, int64_t num_heads, int64_t value_dim, int64_t row_elements,
                bool widen) {
  const int64_t heads = round_up(num_heads, kLanes);
  Scratch s;
  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    float* p = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(base) + at);
    at += round_up(floats * 4, kLineBytes);
    return p;
  };
  s.panel = take(row_elements * heads);
  s.scores = take(kBlock * heads);
  s.sums = take(round_up(value_dim, kChunk) * heads);
  s.widened = take(widen ? kBlock * row_elements : 0);
  s.max = take(heads);
  s.sum = take(heads);
  s.factor = take(heads);
  s.bytes = static_cast<size_t>(at);
  return s;
}

// Addresses of `count` rows; the last is repeated up to a multiple of 4.
INDEXCACHE_INLINE void find_rows(const SparseMlaSpan& span, int64_t begin, int64_t count,
                                 const uint8_t** rows) {
  const int64_t row_bytes = span.row_elements * (span.rows_are_bf16 ? 2 : 4);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = span.positions[begin + i];
    rows[i] = span.base + span.pages[position / kSparseMlaPageTokens] * span.page_bytes +
              position % kSparseMlaPageTokens * row_bytes;
  }
  for (int64_t i = count; i < kBlock && i % 4 != 0; ++i) rows[i] = rows[count - 1];
}

void widen_row(const uint8_t* row, int64_t n, float* to) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(row);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vec_store(to + i, vec_load_bf16(from + i));
  for (; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, sizeof(bits));
  }
}

template <bool kPairs>
void finish(const SparseMlaSpan& span, const Scratch& s) {
  const int64_t heads = round_up(span.num_heads, kLanes);
  for (int64_t h = 0; h < span.num_heads; ++h) {
    const Vec factor = vec_set(span.max == nullptr ? 1.0f / s.sum[h] : 1.0f);
    for (int64_t d = 0; d < span.value_dim; d += kChunk) {
      const float* from = s.sums + d * heads + h * kChunk;
      Vec a = vec_mul(vec_load(from), factor), b = vec_mul(vec_load(from + kLanes), factor);
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
        const Vec low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xEE);
        a = _mm512_shuffle_f32x4(low, low, 0xD8);
        b = _mm512_shuffle_f32x4(high, high, 0xD8);
      }
#endif
      float* to = span.out + h * span.value_dim + d;
      store_first(to, a, span.value_dim - d);
      store_first(to + kLanes, b, span.value_dim - d - kLanes);
    }
    if (span.max != nullptr) {
      span.max[h] = s.max[h];
      span.sum[h] = s.sum[h];
    }
  }
}

template <bool kPairs>
void attend(const SparseMlaSpan& span) {
  const bool widen = span.rows_are_bf16 && !kPairs;
  const Scratch s = lay_out(span.scratch, span.num_heads, span.value_dim, span.row_elements, widen);
  const int64_t heads = round_up(span.num_heads, kLanes);
  const int64_t steps = kPairs ? span.row_elements / 2 : span.row_elements;
  const int64_t chunk_bytes = kChunk * (kPairs ? 2 : 4);
  const int64_t row_bytes = span.row_elements * (span.rows_are_bf16 ? 2 : 4);

  const uint8_t* sources[2][kBlock];
  find_rows(span, 0, min64(kBlock, span.count), sources[0]);
  // Lanes without a head are carried along, so they must hold numbers.
  for (int64_t h = 0; h < heads; h += kLanes) {
    vec_store(s.max + h, vec_set(kLowest));
    vec_store(s.sum + h, vec_zero());
    for (int64_t r = 0; r < kBlock; ++r) {
      vec_store(s.scores + h * kBlock + r * kLanes, vec_zero());
    }
  }
  for_each_panel(span.num_heads, [&]<class L>(int64_t head) {
    pack_panel<L, kPairs>(span, head, steps, s.panel + head * steps);
  });

  const uint8_t* widened[kBlock];
  for (int64_t r = 0; r < kBlock; ++r) {
    widened[r] = reinterpret_cast<const uint8_t*>(s.widened + r * span.row_elements);
  }
  for (int64_t begin = 0, turn = 0; begin < span.count; begin += kBlock, turn ^= 1) {
    const int64_t num_rows = min64(kBlock, span.count - begin);
    const int64_t num_next = min64(kBlock, span.count - begin - num_rows);
    const uint8_t* const* source = sources[turn];
    const uint8_t* const* rows = source;
    if (widen) {
      for (int64_t r = 0; r < round_up(num_rows, 4); ++r) {
        widen_row(source[r], span.row_elements, s.widened + r * span.row_elements);
      }
      rows = widened;
    }
    for_each_panel(span.num_heads, [&]<class L>(int64_t head) {
      score_block<L, kPairs>(rows, num_rows, s.panel + head * steps, steps, span.scale,
                             s.scores + head * kBlock);
    });
    const int64_t even_rows = round_up(num_rows, 2);
    for (int64_t h = 0; h < heads; h += kLanes) {
      float* scores = s.scores + h * kBlock;
      if (num_rows < even_rows) {
        vec_store(scores + num_rows * kLanes, vec_set(-__builtin_inff()));
      }
      softmax_block<kPairs>(scores, even_rows, s.max + h, s.sum + h, s.factor + h);
    }
    if (num_next > 0) find_rows(span, begin + num_rows, num_next, sources[turn ^ 1]);
    for (int64_t r = num_next; r < kBlock; ++r) sources[turn ^ 1][r] = source[0];
    const ValueBlock block{rows, sources[turn ^ 1], even_rows, row_bytes, begin == 0};
    const int64_t prefetch_stride = round_up(span.value_dim, kChunk) / kChunk * kLineBytes;
    for (int64_t d = 0; d < span.value_dim; d += kChunk) {
      const int64_t n = span.value_dim - d, chunk = d / kChunk;
      float* sums = s.sums + d * heads;
      if (n >= kChunk) {
        value_chunk<kPairs, false>(block, span.num_heads, s.scores, chunk * chunk_bytes, kChunk,
                                   chunk * kLineBytes, prefetch_stride, s.factor, sums);
      } else {
        value_chunk<kPairs, true>(block, span.num_heads, s.scores, chunk * chunk_bytes, n,
                                  chunk * kLineBytes, prefetch_stride, s.factor, sums);
      }
    }
  }
  finish<kPairs>(span, s);
}

}  // namespace

size_t sparse_mla_scratch_bytes(int64_t num_heads, int64_t value_dim, int64_t row_elements,
                                bool rows_are_bf16) {
  return lay_out(nullptr, num_heads, value_dim, row_elements, rows_are_bf16 && !kHasDot).bytes;
}

void sparse_mla_span(const SparseMlaSpan& span) {
  if (span.count == 0) {
    for (int64_t i = 0; i < span.num_heads * span.value_dim; ++i) span.out[i] = 0;
    return;
  }
  if constexpr (kHasDot) {
    if (span.rows_are_bf16) return attend<true>(span);
  }
  attend<false>(span);
}

void sparse_mla_merge(const SparseMlaMerge& merge) {
  Vec max = vec_set(merge.max[0]);
  for (int64_t i = 1; i < merge.num_parts; ++i) {
    max = vec_max(vec_set(merge.max[i * merge.max_stride]), max);
  }
  Vec sum = vec_zero();
  for (int64_t i = 0; i < merge.num_parts; ++i) {
    const Vec weight = vec_exp(vec_sub(vec_set(merge.max[i * merge.max_stride]), max));
    sum = vec_fma(vec_set(merge.sum[i * merge.max_stride]), weight, sum);
  }
  const Vec inverse = vec_div(vec_set(1), sum);
  for (int64_t i = 0; i < merge.num_parts; ++i) {
    const Vec weight =
        vec_mul(vec_exp(vec_sub(vec_set(merge.max[i * merge.max_stride]), max)), inverse);
    const float* part = merge.part + i * merge.part_stride;
    for (int64_t d = 0; d < merge.value_dim; d += kLanes) {
      const int64_t n = merge.value_dim - d;
      const Vec before = i == 0 ? vec_zero() : load_first(merge.out + d, n);
      store_first(merge.out + d, vec_fma(load_first(part + d, n), weight, before), n);
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
