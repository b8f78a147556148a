// Scores are made in tiles of a few keys against vectors of kLanes (query, head) rows: the rows are packed so that lane i
// of panel vector u holds 32-bit unit u (a bf16 pair, or one f32) of row i, and each unit of a key is broadcast straight
// from the cache row. No key is ever copied or transposed, and one broadcast serves two panels.
//
//   many queries   lanes = queries, one panel per head; the sum over heads stays in the lanes
//   few queries    lanes = heads, one panel per kLanes heads of a query; products are transposed so that keys become
//                  lanes, then summed over heads
//
// Both add the same numbers in the same order, so a query's scores do not depend on its neighbours in the batch.
//
// Selection: a score becomes a signed integer of the same order ("rank"), and candidates above the query's threshold are
// appended to its buffer. A full buffer is cut to its best k, which raises the threshold to the k-th best so far; later
// positions lose ties, so from then on only strictly better ones enter.
#include "ops/index_select/index_select_kernel.h"
#include "ops/kit/vec.h"

namespace indexcache {
namespace INDEXCACHE_ISA {

namespace {

constexpr int64_t kPageKeys = 64;
constexpr int64_t kStripe = 32;  // keys scored against all panels before the next keys: they stay in L1
constexpr int kKeys1 = 8;        // keys in a tile of one panel: enough to hide the latency of the sums
constexpr int kKeys2 = kLanes == 16 ? 8 : 4;  // keys in a tile of two panels: what the registers hold
static_assert(kStripe % kLanes == 0 && kPageKeys % kStripe == 0);

// ---- integer vectors

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
  // rows[4 a + c] now holds columns c, 4 + c, 8 + c, 12 + c of rows 4a..4a+3, one in each 128-bit part.
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

// The rank of a score: NaN counts as -infinity, and -0 equals +0.
INDEXCACHE_INLINE IVec score_rank(Vec score) {
  return vec_rank(vec_add(vec_max(score, vec_set(-__builtin_inff())), vec_zero()));
}

// ---- candidates

struct Candidates {
  int32_t* ranks;
  int32_t* positions;
  int64_t count;
  int32_t threshold;  // only higher ranks enter
};

INDEXCACHE_INLINE int64_t count_above(const int32_t* ranks, int64_t n, int32_t pivot) {
  IVec counts[4] = {ivec_set(0), ivec_set(0), ivec_set(0), ivec_set(0)};
  const IVec pivots = ivec_set(pivot);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      counts[j] = ivec_count_gt(counts[j], ivec_load(ranks + i + j * kLanes), pivots);
    }
  }
  for (; i < n; i += kLanes) counts[0] = ivec_count_gt(counts[0], ivec_load(ranks + i), pivots);
  int32_t lanes[kLanes];
  ivec_store(lanes, ivec_add(ivec_add(counts[0], counts[1]), ivec_add(counts[2], counts[3])));
  int64_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

// The lowest `count` set bits.
INDEXCACHE_INLINE uint32_t lowest_bits(uint32_t mask, int64_t count) {
  uint32_t rest = mask;
  for (; count > 0 && rest != 0; --count) rest &= rest - 1;
  return mask ^ rest;
}

// Keeps the best k of n >= k; returns a rank that later candidates must exceed to be among the best k.
int32_t keep_best_ranks(int32_t* ranks, int32_t* positions, int64_t n, int64_t k) {
  // The lowest rank of all is that of no score, so padding is never counted or kept.
  ivec_store(ranks + n, ivec_set(INT32_MIN));
  IVec low = ivec_set(INT32_MAX), high = ivec_set(INT32_MIN);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    low = ivec_min(low, ivec_load(ranks + i));
    high = ivec_max(high, ivec_load(ranks + i));
  }
  int32_t lows[kLanes], highs[kLanes];
  ivec_store(lows, low);
  ivec_store(highs, high);
  int64_t least = ranks[n - 1], most = ranks[n - 1];
  for (int i = 0; i < kLanes; ++i) {
    least = lows[i] < least ? lows[i] : least;
    most = highs[i] > most ? highs[i] : most;
  }
  for (int64_t i = n - n % kLanes; i < n; ++i) {
    least = ranks[i] < least ? ranks[i] : least;
    most = ranks[i] > most ? ranks[i] : most;
  }
  // Bisection: at least k ranks are >= least, fewer than k are >= end. It may stop early, below the k-th best rank, at
  // a bound that parts exactly k.
  int64_t end = most + 1;
  while (end - least > 1) {
    const int64_t middle = least + (end - least) / 2;
    const int64_t count = count_above(ranks, n, static_cast<int32_t>(middle - 1));
    (count >= k ? least : end) = middle;
    if (count == k) break;
  }
  const int32_t kth = static_cast<int32_t>(least);
  int64_t num_ties = k - count_above(ranks, n, kth);

  const IVec bound = ivec_set(kth);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const IVec rank = ivec_load(ranks + i), position = ivec_load(positions + i);
    uint32_t mask = ivec_gt(rank, bound);
    const uint32_t ties = ivec_eq(rank, bound);
    if (ties != 0 && num_ties > 0) {
      const uint32_t taken = lowest_bits(ties, num_ties);
      num_ties -= __builtin_popcount(taken);
      mask |= taken;
    }
    // Stores end at or before the vector just read.
    ivec_store(ranks + kept, ivec_compress(mask, rank));
    ivec_store(positions + kept, ivec_compress(mask, position));
    kept += __builtin_popcount(mask);
  }
  return kth;
}

INDEXCACHE_INLINE void append(Candidates& to, uint32_t mask, IVec ranks, int64_t position, int64_t k,
                              int64_t capacity) {
  ivec_store(to.ranks + to.count, ivec_compress(mask, ranks));
  ivec_store(to.positions + to.count,
             ivec_compress(mask, ivec_add(ivec_iota(), ivec_set(static_cast<int32_t>(position)))));
  to.count += __builtin_popcount(mask);
  if (to.count > capacity - 2 * kLanes) {  // room for kLanes more and for kLanes of padding
    to.threshold = keep_best_ranks(to.ranks, to.positions, to.count, k);
    to.count = k;
  }
}

// Takes the candidates among kLanes keys from `position` on, of which the query sees the first `visible`.
INDEXCACHE_INLINE void offer(Candidates& to, IVec ranks, int64_t position, int64_t visible, int64_t k,
                             int64_t capacity) {
  uint32_t mask = ivec_gt(ranks, ivec_set(to.threshold));
  if (visible < kLanes) mask &= visible > 0 ? (1u << visible) - 1 : 0;
  if (mask != 0) append(to, mask, ranks, position, k, capacity);
}

// ---- scratch

bool heads_in_lanes(const IndexSelectTask& task) {
  // Panels to multiply each key with, the transposition of products counted as an eighth.
  const int64_t groups = (task.num_heads + kLanes - 1) / kLanes;
  return 9 * groups * task.num_queries < 8 * task.num_heads;
}

bool uses_dot(const IndexSelectTask& task) { return kHasDot && task.bf16_keys; }

struct Scratch {
  uint8_t* panels;     // [panels][units][kLanes] 32-bit units
  int32_t* rows;       // [kLanes][units rounded up]: what is about to be packed
  float* weights;      // [num_heads][kLanes], lanes = queries
  float* sums;         // lanes = queries: [kStripe][kLanes]; lanes = heads: [kLanes queries][kStripe]
  float* products;     // lanes = heads: [2][kStripe][kLanes]
  float* wide;         // [kStripe][head_dim]: bf16 keys as f32
  int32_t* ranks;      // [num_queries][capacity]
  int32_t* positions;  // [num_queries][capacity]
  int64_t capacity;
  size_t num_bytes;
};

Scratch lay_out(const IndexSelectTask& task) {
  Scratch scratch;
  size_t used = 0;
  const auto take = [&](int64_t num_words) {
    uint8_t* p = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(task.scratch) + used);
    used += (static_cast<size_t>(num_words) * 4 + 63) & ~size_t{63};
    return p;
  };
  const auto take_ints = [&](int64_t n) { return reinterpret_cast<int32_t*>(take(n)); };
  const auto take_floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n)); };
  const int64_t groups = (task.num_heads + kLanes - 1) / kLanes;
  const int64_t panels = heads_in_lanes(task) ? groups * task.num_queries : task.num_heads;
  const int64_t units = uses_dot(task) ? task.head_dim / 2 : task.head_dim;
  scratch.panels = take(panels * units * kLanes);
  scratch.rows = take_ints(kLanes * (units + kLanes));
  scratch.weights = take_floats(task.num_heads * kLanes);
  scratch.sums = take_floats(kStripe * kLanes);
  scratch.products = take_floats(2 * kStripe * kLanes);
  scratch.wide = take_floats(task.bf16_keys && !kHasDot ? kStripe * task.head_dim : 0);
  // Room for k and as many again before a cut, but never more than there are keys.
  const int64_t num_keys = task.key_end - task.key_begin;
  const int64_t most = 2 * task.k + 64 < num_keys ? 2 * task.k + 64 : num_keys;
  scratch.capacity = (most + 2 * kLanes + 15) / 16 * 16;
  scratch.ranks = take_ints(task.num_queries * scratch.capacity);
  scratch.positions = take_ints(task.num_queries * scratch.capacity);
  scratch.num_bytes = used;
  return scratch;
}

// ---- packing

// A panel of up to kLanes rows of q; lanes without a row are zero.
template <bool kDot>
void pack_panel(const Scratch& scratch, const float* q, int64_t num_rows, int64_t row_stride,
                int64_t head_dim, bool round, uint8_t* panel) {
  const int64_t units = kDot ? head_dim / 2 : head_dim;
  const int64_t padded = (units + kLanes - 1) / kLanes * kLanes;
  for (int64_t row = 0; row < kLanes; ++row) {
    int32_t* to = scratch.rows + row * padded;
    for (int64_t u = padded - kLanes; u < padded; ++u) to[u] = 0;
    const float* from = q + row * row_stride;
    if (row >= num_rows) {
      for (int64_t u = 0; u < padded; ++u) to[u] = 0;
    } else if (kDot || round) {
      uint16_t* half = reinterpret_cast<uint16_t*>(to);
      uint16_t rounded[kLanes];
      int64_t d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) {
        vec_store_bf16(kDot ? half + d : rounded, vec_load(from + d));
        if (!kDot) vec_store(reinterpret_cast<float*>(to) + d, vec_load_bf16(rounded));
      }
      float tail[kLanes] = {};
      for (int64_t i = d; i < head_dim; ++i) tail[i - d] = from[i];
      vec_store_bf16(rounded, vec_load(tail));
      vec_store(tail, vec_load_bf16(rounded));
      for (int64_t i = d; i < head_dim; ++i) {
        if (kDot) {
          half[i] = rounded[i - d];
        } else {
          __builtin_memcpy(to + i, tail + (i - d), sizeof(float));
        }
      }
    } else {
      __builtin_memcpy(to, from, static_cast<size_t>(head_dim) * sizeof(float));
    }
  }
  for (int64_t u = 0; u < units; u += kLanes) {
    IVec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = ivec_load(scratch.rows + i * padded + u);
    transpose(block);
    const int64_t n = units - u < kLanes ? units - u : kLanes;
    int32_t* to = reinterpret_cast<int32_t*>(panel) + u * kLanes;
    for (int64_t i = 0; i < n; ++i) ivec_store(to + i * kLanes, block[i]);
  }
}

// ---- products

// All lanes of a panel.
template <bool kDot>
struct Whole {
  using Type = Vec;
  static constexpr int kKeysAlone = kKeys1;
  INDEXCACHE_INLINE Type zero() { return vec_zero(); }
  INDEXCACHE_INLINE Type load(const float* p) { return vec_load(p); }
  INDEXCACHE_INLINE void store(float* p, Type v) { vec_store(p, v); }
  INDEXCACHE_INLINE Type relu(Type v) { return vec_max(vec_zero(), v); }
  INDEXCACHE_INLINE Type multiply_add(Type sum, Type panel, const uint8_t* unit) {
#if defined(__AVX512BF16__)
    if constexpr (kDot) {
      return vec_dot_bf16(sum, vec_to_bits(panel),
                          vec_broadcast_pair(reinterpret_cast<const uint16_t*>(unit)));
    }
#endif
    float x;
    __builtin_memcpy(&x, unit, sizeof(x));
    return vec_fma(panel, vec_set(x), sum);
  }
};

#if defined(__AVX512F__)
// The first half of the lanes, for up to 8 heads: where 512 bits are worked off as two times 256, in half the time.
template <bool kDot>
struct Half {
  using Type = __m256;
  static constexpr int kKeysAlone = 16;
  INDEXCACHE_INLINE Type zero() { return _mm256_setzero_ps(); }
  INDEXCACHE_INLINE Type load(const float* p) { return _mm256_loadu_ps(p); }
  INDEXCACHE_INLINE void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  INDEXCACHE_INLINE Type relu(Type v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  INDEXCACHE_INLINE Type multiply_add(Type sum, Type panel, const uint8_t* unit) {
#if defined(__AVX512BF16__)
    if constexpr (kDot) {
      int32_t pair;
      __builtin_memcpy(&pair, unit, sizeof(pair));
      return _mm256_dpbf16_ps(sum, (__m256bh)panel, (__m256bh)_mm256_set1_epi32(pair));
    }
#endif
    float x;
    __builtin_memcpy(&x, unit, sizeof(x));
    return _mm256_fmadd_ps(panel, _mm256_set1_ps(x), sum);
  }
};
#else
template <bool kDot>
using Half = Whole<kDot>;
#endif

// dots[p][i] = panel p times key i; NaN stays NaN, negative becomes 0.
template <class Lanes, int kPanels, int kKeys>
INDEXCACHE_INLINE void relu_dots(const uint8_t* panels, int64_t units, const uint8_t* keys,
                                 int64_t row_bytes, typename Lanes::Type (&dots)[kPanels][kKeys]) {
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) dots[p][i] = Lanes::zero();
  }
  const uint8_t* rows[kKeys];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) rows[i] = keys + i * row_bytes;
  const float* panel = reinterpret_cast<const float*>(panels);
  for (int64_t u = 0; u < units; ++u) {
    typename Lanes::Type rows_of_q[kPanels];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) rows_of_q[p] = Lanes::load(panel + (p * units + u) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        dots[p][i] = Lanes::multiply_add(dots[p][i], rows_of_q[p], rows[i] + u * 4);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) dots[p][i] = Lanes::relu(dots[p][i]);
  }
}

struct Stripe {
  const uint8_t* keys;
  const uint8_t* next;  // to be fetched meanwhile, or null
  int64_t row_bytes;
  int64_t units;
};

INDEXCACHE_INLINE void prefetch(const Stripe& stripe, int64_t key, int64_t num_keys) {
  if (stripe.next == nullptr) return;
  const uint8_t* begin = stripe.next + key * stripe.row_bytes;
  for (int64_t i = 0; i < num_keys * stripe.row_bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(begin + i), _MM_HINT_T1);
  }
}

// sums[key][query] += weight[panel][query] * relu(panel x key) for kPanels panels
template <bool kDot, int kPanels, int kKeys>
void add_heads(const Stripe& stripe, const uint8_t* panels, const float* weights, bool fetch_next,
               float* sums) {
  for (int64_t key = 0; key < kStripe; key += kKeys) {
    if (fetch_next) prefetch(stripe, key, kKeys);
    Vec dots[kPanels][kKeys];
    relu_dots<Whole<kDot>>(panels, stripe.units, stripe.keys + key * stripe.row_bytes,
                           stripe.row_bytes, dots);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      Vec sum = vec_load(sums + (key + i) * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        sum = vec_fma(vec_load(weights + p * kLanes), dots[p][i], sum);
      }
      vec_store(sums + (key + i) * kLanes, sum);
    }
  }
}

// products[panel][key][lane] = relu(panel x key)
template <class Lanes, int kPanels, int kKeys>
void store_products(const Stripe& stripe, const uint8_t* panels, bool fetch_next, float* products) {
  for (int64_t key = 0; key < kStripe; key += kKeys) {
    if (fetch_next) prefetch(stripe, key, kKeys);
    typename Lanes::Type dots[kPanels][kKeys];
    relu_dots<Lanes>(panels, stripe.units, stripe.keys + key * stripe.row_bytes,
                                    stripe.row_bytes, dots);
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        Lanes::store(products + (p * kStripe + key + i) * kLanes, dots[p][i]);
      }
    }
  }
}

// scores[key] += weight[head] * products[key][head], one head after the other
void add_products(const float* products, const float* weights, int64_t num_heads, float* scores) {
  for (int64_t key = 0; key < kStripe; key += kLanes) {
    IVec rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = vec_to_bits(vec_load(products + (key + i) * kLanes));
    }
    transpose(rows);
    Vec sum = vec_load(scores + key);
#pragma GCC unroll 16
    for (int h = 0; h < kLanes; ++h) {
      if (h < num_heads) sum = vec_fma(vec_set(weights[h]), vec_from_bits(rows[h]), sum);
    }
    vec_store(scores + key, sum);
  }
}

// ---- one stripe of keys, all queries

template <bool kDot>
void score_lanes_are_queries(const IndexSelectTask& task, const Scratch& scratch, const Stripe& stripe) {
  for (int64_t i = 0; i < kStripe * kLanes; i += kLanes) vec_store(scratch.sums + i, vec_zero());
  const int64_t panel_bytes = stripe.units * kLanes * 4;
  int64_t h = 0;
  for (; h + 2 <= task.num_heads; h += 2) {
    add_heads<kDot, 2, kKeys2>(stripe, scratch.panels + h * panel_bytes, scratch.weights + h * kLanes,
                               h == 0, scratch.sums);
  }
  if (h < task.num_heads) {
    add_heads<kDot, 1, kKeys1>(stripe, scratch.panels + h * panel_bytes, scratch.weights + h * kLanes,
                               h == 0, scratch.sums);
  }
}

template <bool kDot>
void score_lanes_are_heads(const IndexSelectTask& task, const Scratch& scratch, const Stripe& stripe) {
  const int64_t panel_bytes = stripe.units * kLanes * 4;
  const int64_t groups = (task.num_heads + kLanes - 1) / kLanes;
  const int64_t num_panels = groups * task.num_queries;
  for (int64_t i = 0; i < task.num_queries * kStripe; i += kLanes) {
    vec_store(scratch.sums + i, vec_zero());
  }
  for (int64_t panel = 0; panel < num_panels; panel += 2) {
    const uint8_t* panels = scratch.panels + panel * panel_bytes;
    const int64_t n = num_panels - panel < 2 ? 1 : 2;
    const bool half = 2 * task.num_heads <= kLanes;
    if (half && n == 2) {
      store_products<Half<kDot>, 2, kKeys2>(stripe, panels, panel == 0, scratch.products);
    } else if (half) {
      store_products<Half<kDot>, 1, Half<kDot>::kKeysAlone>(stripe, panels, panel == 0,
                                                            scratch.products);
    } else if (n == 2) {
      store_products<Whole<kDot>, 2, kKeys2>(stripe, panels, panel == 0, scratch.products);
    } else {
      store_products<Whole<kDot>, 1, kKeys1>(stripe, panels, panel == 0, scratch.products);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t query = (panel + i) / groups, head = (panel + i) % groups * kLanes;
      add_products(scratch.products + i * kStripe * kLanes,
                   task.weights + query * task.num_heads + head, task.num_heads - head,
                   scratch.sums + query * kStripe);
    }
  }
}

template <bool kDot>
void scan_keys(const IndexSelectTask& task) {
  const Scratch scratch = lay_out(task);
  const bool lanes_are_heads = heads_in_lanes(task);
  const bool widen = task.bf16_keys && !kDot;
  const int64_t heads = task.num_heads, dim = task.head_dim;
  const int64_t units = kDot ? dim / 2 : dim;
  const int64_t panel_bytes = units * kLanes * 4;

  if (lanes_are_heads) {
    uint8_t* panel = scratch.panels;
    for (int64_t query = 0; query < task.num_queries; ++query) {
      for (int64_t h = 0; h < heads; h += kLanes, panel += panel_bytes) {
        pack_panel<kDot>(scratch, task.q + (query * heads + h) * dim,
                         heads - h < kLanes ? heads - h : kLanes, dim, dim, widen, panel);
      }
    }
  } else {
    for (int64_t h = 0; h < heads; ++h) {
      pack_panel<kDot>(scratch, task.q + h * dim, task.num_queries, heads * dim, dim, widen,
                       scratch.panels + h * panel_bytes);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        scratch.weights[h * kLanes + lane] =
            lane < task.num_queries ? task.weights[lane * heads + h] : 0.0f;
      }
    }
  }
  Candidates candidates[kLanes];
  for (int64_t i = 0; i < task.num_queries; ++i) {
    candidates[i] = {scratch.ranks + i * scratch.capacity, scratch.positions + i * scratch.capacity, 0,
                     INT32_MIN};
  }

  const int64_t row_bytes = dim * (task.bf16_keys ? 2 : 4);
  const auto row = [&](int64_t position) {
    return task.key_base + task.pages[position / kPageKeys] * task.page_bytes +
           position % kPageKeys * row_bytes;
  };
  for (int64_t begin = task.key_begin; begin < task.key_end; begin += kStripe) {
    const int64_t next = begin + kStripe;
    Stripe stripe = {row(begin), next < task.key_end ? row(next) : nullptr, row_bytes, units};
    if (widen) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(stripe.keys);
      // kStripe * dim is a multiple of kLanes because kStripe is.
      for (int64_t i = 0; i < kStripe * dim; i += kLanes) {
        vec_store(scratch.wide + i, vec_load_bf16(from + i));
      }
      stripe.keys = reinterpret_cast<const uint8_t*>(scratch.wide);
      stripe.next = nullptr;
      stripe.row_bytes = dim * 4;
    }
    if (lanes_are_heads) {
      score_lanes_are_heads<kDot>(task, scratch, stripe);
    } else {
      score_lanes_are_queries<kDot>(task, scratch, stripe);
    }
    for (int64_t key = 0; key < kStripe; key += kLanes) {
      int32_t ranks[kLanes * kLanes];
      if (!lanes_are_heads) {
        IVec rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = score_rank(vec_load(scratch.sums + (key + i) * kLanes));
        }
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) ivec_store(ranks + i * kLanes, rows[i]);
      }
      for (int64_t i = 0; i < task.num_queries; ++i) {
        const int64_t seen = task.first_position + i + 1;
        const int64_t visible = (seen < task.key_end ? seen : task.key_end) - (begin + key);
        offer(candidates[i],
              lanes_are_heads ? score_rank(vec_load(scratch.sums + i * kStripe + key))
                              : ivec_load(ranks + i * kLanes),
              begin + key, visible, task.k, scratch.capacity);
      }
    }
  }

  for (int64_t i = 0; i < task.num_queries; ++i) {
    Candidates& best = candidates[i];
    if (best.count > task.k) {
      keep_best_ranks(best.ranks, best.positions, best.count, task.k);
      best.count = task.k;
    }
    const size_t num_bytes = static_cast<size_t>(best.count) * sizeof(int32_t);
    task.counts[i] = static_cast<int32_t>(best.count);
    __builtin_memcpy(task.positions + i * task.stride, best.positions, num_bytes);
    if (task.ranks != nullptr) __builtin_memcpy(task.ranks + i * task.stride, best.ranks, num_bytes);
  }
}

size_t scratch_bytes(const IndexSelectTask& task) {
  IndexSelectTask measured = task;
  measured.scratch = nullptr;
  return lay_out(measured).num_bytes;
}

void scan(const IndexSelectTask& task) {
  if (uses_dot(task)) {
    scan_keys<kHasDot>(task);
  } else {
    scan_keys<false>(task);
  }
}

void keep_best(int32_t* ranks, int32_t* positions, int64_t n, int64_t k) {
  keep_best_ranks(ranks, positions, n, k);
}

}  // namespace

extern const IndexSelectKernel kIndexSelect;
const IndexSelectKernel kIndexSelect = {kLanes, scratch_bytes, scan, keep_best};

}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
