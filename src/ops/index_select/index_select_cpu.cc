// Scores are made in tiles of a few keys against vectors of kLanes (query, head) rows: the rows are
// packed so that lane i of panel vector u holds 32-bit unit u (one f32, a bf16 pair, or 4 int8) of
// row i, and each unit of a key is broadcast straight from the cache row. No f32 or bf16 key is
// ever copied or transposed, and one broadcast serves two panels.
//
// vpdpbusd multiplies unsigned by signed bytes, so int8 keys are copied once for all panels, a
// stripe at a time, as key + 128, and sums start from -128 * the sum of the row of q: the loop has
// nothing more to do. On the way they may wrap round, at the end they fit. Where an instruction is
// missing, keys and rows of q are widened to f32.
//
//   many queries   lanes = queries, one panel per head; the sum over heads stays in the lanes
//   few queries    lanes = heads, one panel per kLanes heads of a query; products are transposed
//                  so that keys become lanes, then summed over heads
//
// Both add the same numbers in the same order, so a query's scores do not depend on its neighbours
// in the batch.
#include "ops/index_select/index_select_candidates.h"
#include "ops/index_select/index_select_kernel.h"
#include "ops/index_select/index_select_vec.h"
#include "ops/kit/vec.h"
#include "ops/kit/vec_int8.h"

namespace indexcache {
namespace INDEXCACHE_ISA {

namespace {

constexpr int64_t kPageKeys = 64;
// Keys that meet all panels before the next keys come: they stay in L1.
constexpr int64_t kStripe = 32;
// Keys in a tile of one panel, enough to hide the latency of the sums, and of two, what the
// registers hold.
constexpr int kKeys1 = 8;
constexpr int kKeys2 = kLanes == 16 ? 8 : 4;
static_assert(kStripe % kLanes == 0 && kPageKeys % kStripe == 0);

// ---- scratch

bool heads_in_lanes(const IndexSelectTask& task) {
  // Panels to multiply each key with, the transposition of products counted as an eighth.
  const int64_t groups = (task.num_heads + kLanes - 1) / kLanes;
  return 9 * groups * task.num_queries < 8 * task.num_heads;
}

// What the kernel multiplies at once.
enum class Unit { kF32, kPair, kQuad };

#if defined(__AVX512VNNI__)
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif
constexpr Unit kUnitOfBF16 = kHasDot ? Unit::kPair : Unit::kF32;
constexpr Unit kUnitOfI8 = kHasVnni ? Unit::kQuad : Unit::kF32;

Unit unit_of(const IndexSelectTask& task) {
  if (task.keys == IndexKeys::kBF16) return kUnitOfBF16;
  return task.keys == IndexKeys::kI8 ? kUnitOfI8 : Unit::kF32;
}

int64_t num_units(Unit unit, int64_t head_dim) {
  if (unit == Unit::kPair) return head_dim / 2;
  return unit == Unit::kQuad ? (head_dim + 3) / 4 : head_dim;
}

// Vectors of a panel; the one after the units of int8 rows holds what their sums start from.
int64_t panel_vectors(Unit unit, int64_t units) { return units + (unit == Unit::kQuad ? 1 : 0); }

// Whether keys are read from a copy in units of the kernel, not from the cache.
bool copies_keys(const IndexSelectTask& task) {
  return task.keys == IndexKeys::kI8 || (task.keys == IndexKeys::kBF16 && !kHasDot);
}

struct Scratch {
  uint8_t* panels;  // [panels][panel_vectors][kLanes] 32-bit units
  int32_t* rows;    // [kLanes][units rounded up]: what is about to be packed
  // Times the scales of q where keys are int8. Lanes = queries: [num_heads][kLanes]; lanes = heads:
  // [num_queries][num_heads], of int8 keys only
  float* weights;
  float* sums;      // lanes = queries: [kStripe][kLanes]; lanes = heads: [kLanes queries][kStripe]
  float* products;  // lanes = heads: [2][kStripe][kLanes]
  uint8_t* keys;    // [kStripe][units] 32-bit units, where keys are copied
  int32_t* ranks;   // [num_queries][capacity]
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
  const int64_t units = num_units(unit_of(task), task.head_dim);
  scratch.panels = take(panels * panel_vectors(unit_of(task), units) * kLanes);
  scratch.rows = take_ints(kLanes * (units + kLanes));
  scratch.weights = take_floats(task.num_heads * kLanes);
  scratch.sums = take_floats(kStripe * kLanes);
  scratch.products = take_floats(2 * kStripe * kLanes);
  scratch.keys = take(copies_keys(task) ? kStripe * units : 0);
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

// One row of q as units, in the precision that goes with the keys. `to` has room for whole vectors
// and is zero there.
template <Unit kUnit>
void pack_row_bf16(const float* from, int64_t head_dim, int32_t* to) {
  uint16_t* half = reinterpret_cast<uint16_t*>(to);
  uint16_t rounded[kLanes];
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    vec_store_bf16(kUnit == Unit::kPair ? half + d : rounded, vec_load(from + d));
    if (kUnit == Unit::kF32) vec_store(reinterpret_cast<float*>(to) + d, vec_load_bf16(rounded));
  }
  float tail[kLanes] = {};
  for (int64_t i = d; i < head_dim; ++i) tail[i - d] = from[i];
  vec_store_bf16(rounded, vec_load(tail));
  vec_store(tail, vec_load_bf16(rounded));
  for (int64_t i = d; i < head_dim; ++i) {
    if (kUnit == Unit::kPair) {
      half[i] = rounded[i - d];
    } else {
      __builtin_memcpy(to + i, tail + (i - d), sizeof(float));
    }
  }
}

// Returns the scale; `start` is what the sums of this lane start from.
template <Unit kUnit>
float pack_row_int8(const float* from, int64_t head_dim, int32_t* to, int32_t* start) {
  int8_t* bytes = reinterpret_cast<int8_t*>(to);
  const float scale = vec_quantise_row(from, head_dim, bytes);
  int32_t sum = 0;
  for (int64_t i = 0; i < head_dim; ++i) sum += bytes[i];
  *start = -128 * sum;
  // From the end, because the floats grow over the bytes.
  for (int64_t i = head_dim - 1; kUnit == Unit::kF32 && i >= 0; --i) {
    const float value = bytes[i];
    __builtin_memcpy(to + i, &value, sizeof(value));
  }
  return scale;
}

// A panel of up to kLanes rows of q; lanes without a row are zero. int8 rows leave their scales in
// `scales`.
template <Unit kUnit>
void pack_panel(const Scratch& scratch, IndexKeys keys, const float* q, int64_t num_rows,
                int64_t row_stride, int64_t head_dim, uint8_t* panel, float (&scales)[kLanes]) {
  const int64_t units = num_units(kUnit, head_dim);
  const int64_t padded = (units + kLanes - 1) / kLanes * kLanes;
  int32_t starts[kLanes] = {};
  for (int64_t row = 0; row < kLanes; ++row) {
    int32_t* to = scratch.rows + row * padded;
    for (int64_t u = padded - kLanes; u < padded; ++u) to[u] = 0;
    const float* from = q + row * row_stride;
    if (row >= num_rows) {
      for (int64_t u = 0; u < padded; ++u) to[u] = 0;
    } else if (keys == IndexKeys::kI8) {
      scales[row] = pack_row_int8<kUnit>(from, head_dim, to, starts + row);
    } else if (keys == IndexKeys::kBF16) {
      pack_row_bf16<kUnit>(from, head_dim, to);
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
  if (kUnit == Unit::kQuad) {
    __builtin_memcpy(panel + units * kLanes * 4, starts, sizeof(starts));
  }
}

// A stripe of keys in units of the kernel; `next` is fetched meanwhile, if there is one.
template <Unit kUnit>
void copy_keys(const IndexSelectTask& task, const uint8_t* from, const uint8_t* next, uint8_t* to) {
  // A multiple of kLanes because kStripe is.
  const int64_t num_elements = kStripe * task.head_dim;
#if defined(__AVX512VNNI__)
  if constexpr (kUnit == Unit::kQuad) {
    // Rows of whole units are one run; others are padded one by one.
    const bool whole = task.head_dim % 4 == 0;
    const int64_t num_runs = whole ? 1 : kStripe;
    const int64_t from_bytes = num_elements / num_runs;
    const int64_t to_bytes = whole ? num_elements : num_units(kUnit, task.head_dim) * 4;
    const auto mask = [](int64_t n) { return n < 64 ? (1ull << n) - 1 : ~0ull; };
    const __m512i flip = _mm512_set1_epi8(-128);
    for (int64_t run = 0; run < num_runs; ++run) {
      for (int64_t i = 0; i < to_bytes; i += 64) {
        const __m512i signed_bytes =
            _mm512_maskz_loadu_epi8(mask(from_bytes - i), from + run * from_bytes + i);
        _mm512_mask_storeu_epi8(to + run * to_bytes + i, mask(to_bytes - i),
                                _mm512_xor_si512(signed_bytes, flip));
      }
    }
    for (int64_t i = 0; next != nullptr && i < num_elements; i += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
    }
    return;
  }
#endif
  static_cast<void>(next);
  float* wide = reinterpret_cast<float*>(to);
  for (int64_t i = 0; i < num_elements; i += kLanes) {
    vec_store(wide + i, task.keys == IndexKeys::kI8
                            ? vec_load_int8(reinterpret_cast<const int8_t*>(from) + i)
                            : vec_load_bf16(reinterpret_cast<const uint16_t*>(from) + i));
  }
}

// ---- products

// All lanes of a panel.
template <Unit kUnit>
struct Whole {
  using Type = Vec;  // of products
  using Sum = Vec;   // of their sums, and of a vector of the panel
  static constexpr int kKeysAlone = kKeys1;
  static constexpr Unit kUnitOfRows = kUnit;
  INDEXCACHE_INLINE Sum start(const float*) { return vec_zero(); }
  INDEXCACHE_INLINE Sum load(const float* p) { return vec_load(p); }
  INDEXCACHE_INLINE void store(float* p, Type v) { vec_store(p, v); }
  INDEXCACHE_INLINE Type relu(Sum v) { return vec_max(vec_zero(), v); }
  INDEXCACHE_INLINE Sum multiply_add(Sum sum, Sum panel, const uint8_t* unit) {
#if defined(__AVX512BF16__)
    if constexpr (kUnit == Unit::kPair) {
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
// The first half of the lanes, for up to 8 heads: where 512 bits are worked off as two times 256,
// in half the time.
template <Unit kUnit>
struct Half {
  using Type = __m256;
  using Sum = __m256;
  static constexpr int kKeysAlone = 16;
  static constexpr Unit kUnitOfRows = kUnit;
  INDEXCACHE_INLINE Sum start(const float*) { return _mm256_setzero_ps(); }
  INDEXCACHE_INLINE Sum load(const float* p) { return _mm256_loadu_ps(p); }
  INDEXCACHE_INLINE void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  INDEXCACHE_INLINE Type relu(Sum v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  INDEXCACHE_INLINE Sum multiply_add(Sum sum, Sum panel, const uint8_t* unit) {
#if defined(__AVX512BF16__)
    if constexpr (kUnit == Unit::kPair) {
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
template <Unit kUnit>
using Half = Whole<kUnit>;
#endif

#if defined(__AVX512VNNI__)
// The sums are exact integers until relu.
template <>
struct Whole<Unit::kQuad> {
  using Type = Vec;
  using Sum = __m512i;
  static constexpr Unit kUnitOfRows = Unit::kQuad;
  INDEXCACHE_INLINE Sum start(const float* p) { return load(p); }
  INDEXCACHE_INLINE Sum load(const float* p) { return _mm512_loadu_si512(p); }
  INDEXCACHE_INLINE void store(float* p, Type v) { vec_store(p, v); }
  INDEXCACHE_INLINE Type relu(Sum v) {
    return _mm512_cvtepi32_ps(_mm512_max_epi32(_mm512_setzero_si512(), v));
  }
  INDEXCACHE_INLINE Sum multiply_add(Sum sum, Sum panel, const uint8_t* unit) {
    int32_t quad;
    __builtin_memcpy(&quad, unit, sizeof(quad));
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad), panel);
  }
};

template <>
struct Half<Unit::kQuad> {
  using Type = __m256;
  using Sum = __m256i;
  static constexpr int kKeysAlone = 16;
  static constexpr Unit kUnitOfRows = Unit::kQuad;
  INDEXCACHE_INLINE Sum start(const float* p) { return load(p); }
  INDEXCACHE_INLINE Sum load(const float* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  INDEXCACHE_INLINE void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  INDEXCACHE_INLINE Type relu(Sum v) {
    return _mm256_cvtepi32_ps(_mm256_max_epi32(_mm256_setzero_si256(), v));
  }
  INDEXCACHE_INLINE Sum multiply_add(Sum sum, Sum panel, const uint8_t* unit) {
    int32_t quad;
    __builtin_memcpy(&quad, unit, sizeof(quad));
    return _mm256_dpbusd_epi32(sum, _mm256_set1_epi32(quad), panel);
  }
};
#endif

// dots[p][i] = panel p times key i; NaN stays NaN, negative becomes 0.
template <class Lanes, int kPanels, int kKeys>
INDEXCACHE_INLINE void relu_dots(const uint8_t* panels, int64_t units, const uint8_t* keys,
                                 int64_t row_bytes, typename Lanes::Type (&dots)[kPanels][kKeys]) {
  const float* panel = reinterpret_cast<const float*>(panels);
  const int64_t vectors = panel_vectors(Lanes::kUnitOfRows, units);
  typename Lanes::Sum sums[kPanels][kKeys];
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) {
    const auto start = Lanes::start(panel + (p * vectors + units) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) sums[p][i] = start;
  }
  // Few enough pointers and offsets for the registers. The compiler must not see how they relate,
  // or it makes one pointer for each key and spills them.
  constexpr int kOffsets = kKeys < 8 ? kKeys : 8;
  const uint8_t* bases[kKeys / kOffsets];
  int64_t offsets[kOffsets];
#pragma GCC unroll 16
  for (int i = 0; i < kKeys / kOffsets; ++i) {
    bases[i] = keys + i * kOffsets * row_bytes;
    asm("" : "+r"(bases[i]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kOffsets; ++i) {
    offsets[i] = i * row_bytes;
    if (i > 0) asm("" : "+r"(offsets[i]));
  }
  for (int64_t u = 0; u < units; ++u) {
    typename Lanes::Sum rows_of_q[kPanels];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      rows_of_q[p] = Lanes::load(panel + (p * vectors + u) * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        sums[p][i] = Lanes::multiply_add(sums[p][i], rows_of_q[p],
                                         bases[i / kOffsets] + offsets[i % kOffsets]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys / kOffsets; ++i) bases[i] += 4;
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) dots[p][i] = Lanes::relu(sums[p][i]);
  }
}

struct Stripe {
  const uint8_t* keys;
  const uint8_t* next;  // to be fetched meanwhile, or null
  int64_t row_bytes;
  int64_t units;
};

// To L2: the hardware does not follow the cache from page to page, and without this a decode step
// over 64K keys took more than twice as long. Into L1 they would push out the panels.
INDEXCACHE_INLINE void prefetch(const Stripe& stripe, int64_t key, int64_t num_keys) {
  if (stripe.next == nullptr) return;
  const uint8_t* begin = stripe.next + key * stripe.row_bytes;
  for (int64_t i = 0; i < num_keys * stripe.row_bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(begin + i), _MM_HINT_T1);
  }
}

// sums[key][query] += weight[panel][query] * relu(panel x key) for kPanels panels; the first ones
// start from 0.
template <Unit kUnit, int kPanels, int kKeys>
void add_heads(const Stripe& stripe, const uint8_t* panels, const float* weights, bool first,
               float* sums) {
  for (int64_t key = 0; key < kStripe; key += kKeys) {
    if (first) prefetch(stripe, key, kKeys);
    Vec dots[kPanels][kKeys];
    relu_dots<Whole<kUnit>>(panels, stripe.units, stripe.keys + key * stripe.row_bytes,
                            stripe.row_bytes, dots);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      Vec sum = first ? vec_zero() : vec_load(sums + (key + i) * kLanes);
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
void store_products(const Stripe& stripe, const uint8_t* panels, bool first, float* products) {
  for (int64_t key = 0; key < kStripe; key += kKeys) {
    if (first) prefetch(stripe, key, kKeys);
    typename Lanes::Type dots[kPanels][kKeys];
    relu_dots<Lanes>(panels, stripe.units, stripe.keys + key * stripe.row_bytes, stripe.row_bytes,
                     dots);
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

template <Unit kUnit>
void score_lanes_are_queries(const IndexSelectTask& task, const Scratch& scratch,
                             const Stripe& stripe) {
  const int64_t panel_bytes = panel_vectors(kUnit, stripe.units) * kLanes * 4;
  int64_t h = 0;
  for (; h + 2 <= task.num_heads; h += 2) {
    add_heads<kUnit, 2, kKeys2>(stripe, scratch.panels + h * panel_bytes,
                                scratch.weights + h * kLanes, h == 0, scratch.sums);
  }
  if (h < task.num_heads) {
    add_heads<kUnit, 1, kKeys1>(stripe, scratch.panels + h * panel_bytes,
                                scratch.weights + h * kLanes, h == 0, scratch.sums);
  }
}

// Panels are taken two at a time, be they of one query or of two.
template <Unit kUnit>
void score_lanes_are_heads(const IndexSelectTask& task, const Scratch& scratch,
                           const Stripe& stripe) {
  const int64_t panel_bytes = panel_vectors(kUnit, stripe.units) * kLanes * 4;
  const int64_t groups = (task.num_heads + kLanes - 1) / kLanes;
  const int64_t num_panels = groups * task.num_queries;
  for (int64_t i = 0; i < task.num_queries * kStripe; i += kLanes) {
    vec_store(scratch.sums + i, vec_zero());
  }
  const float* weights = task.keys == IndexKeys::kI8 ? scratch.weights : task.weights;
  const bool half = 2 * task.num_heads <= kLanes;
  for (int64_t panel = 0; panel < num_panels; panel += 2) {
    const uint8_t* panels = scratch.panels + panel * panel_bytes;
    const int64_t n = num_panels - panel < 2 ? 1 : 2;
    if (half && n == 2) {
      store_products<Half<kUnit>, 2, kKeys2>(stripe, panels, panel == 0, scratch.products);
    } else if (half) {
      store_products<Half<kUnit>, 1, Half<kUnit>::kKeysAlone>(stripe, panels, panel == 0,
                                                              scratch.products);
    } else if (n == 2) {
      store_products<Whole<kUnit>, 2, kKeys2>(stripe, panels, panel == 0, scratch.products);
    } else {
      store_products<Whole<kUnit>, 1, kKeys1>(stripe, panels, panel == 0, scratch.products);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t query = (panel + i) / groups, head = (panel + i) % groups * kLanes;
      add_products(scratch.products + i * kStripe * kLanes, weights + query * task.num_heads + head,
                   task.num_heads - head, scratch.sums + query * kStripe);
    }
  }
}

template <Unit kUnit>
void scan_keys(const IndexSelectTask& task) {
  const Scratch scratch = lay_out(task);
  const bool lanes_are_heads = heads_in_lanes(task);
  const bool int8 = task.keys == IndexKeys::kI8, copy = copies_keys(task);
  const int64_t heads = task.num_heads, dim = task.head_dim;
  const int64_t units = num_units(kUnit, dim);
  const int64_t panel_bytes = panel_vectors(kUnit, units) * kLanes * 4;
  float scales[kLanes];

  if (lanes_are_heads) {
    uint8_t* panel = scratch.panels;
    for (int64_t query = 0; query < task.num_queries; ++query) {
      for (int64_t h = 0; h < heads; h += kLanes, panel += panel_bytes) {
        const int64_t n = heads - h < kLanes ? heads - h : kLanes, row = query * heads + h;
        pack_panel<kUnit>(scratch, task.keys, task.q + row * dim, n, dim, dim, panel, scales);
        for (int64_t i = 0; int8 && i < n; ++i) {
          scratch.weights[row + i] = task.weights[row + i] * scales[i];
        }
      }
    }
  } else {
    for (int64_t h = 0; h < heads; ++h) {
      pack_panel<kUnit>(scratch, task.keys, task.q + h * dim, task.num_queries, heads * dim, dim,
                        scratch.panels + h * panel_bytes, scales);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float weight = lane < task.num_queries ? task.weights[lane * heads + h] : 0.0f;
        const bool scaled = int8 && lane < task.num_queries;
        scratch.weights[h * kLanes + lane] = scaled ? weight * scales[lane] : weight;
      }
    }
  }
  Candidates candidates[kLanes];
  for (int64_t i = 0; i < task.num_queries; ++i) {
    candidates[i] = {scratch.ranks + i * scratch.capacity, scratch.positions + i * scratch.capacity,
                     0, INT32_MIN};
  }

  const int64_t row_bytes = dim * (int8 ? 1 : task.keys == IndexKeys::kBF16 ? 2 : 4);
  const auto page = [&](int64_t position) {
    return task.key_base + task.pages[position / kPageKeys] * task.page_bytes;
  };
  const auto row = [&](int64_t position) {
    return page(position) + position % kPageKeys * row_bytes;
  };
  for (int64_t begin = task.key_begin; begin < task.key_end; begin += kStripe) {
    const int64_t next = begin + kStripe;
    Stripe stripe = {row(begin), next < task.key_end ? row(next) : nullptr, row_bytes, units};
    if (copy) {
      copy_keys<kUnit>(task, stripe.keys, stripe.next, scratch.keys);
      stripe = {scratch.keys, nullptr, units * 4, units};
    }
    const float* key_scales =
        reinterpret_cast<const float*>(page(begin) + kPageKeys * dim) + begin % kPageKeys;
    if (lanes_are_heads) {
      score_lanes_are_heads<kUnit>(task, scratch, stripe);
    } else {
      score_lanes_are_queries<kUnit>(task, scratch, stripe);
    }
    for (int64_t key = 0; key < kStripe; key += kLanes) {
      int32_t ranks[kLanes * kLanes];
      if (!lanes_are_heads) {
        IVec rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const Vec sum = vec_load(scratch.sums + (key + i) * kLanes);
          rows[i] = score_rank(int8 ? vec_mul(sum, vec_set(key_scales[key + i])) : sum);
        }
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) ivec_store(ranks + i * kLanes, rows[i]);
      }
      for (int64_t i = 0; i < task.num_queries; ++i) {
        const int64_t seen = task.first_position + i + 1;
        const int64_t visible = (seen < task.key_end ? seen : task.key_end) - (begin + key);
        IVec rank;
        if (lanes_are_heads) {
          const Vec sum = vec_load(scratch.sums + i * kStripe + key);
          rank = score_rank(int8 ? vec_mul(sum, vec_load(key_scales + key)) : sum);
        } else {
          rank = ivec_load(ranks + i * kLanes);
        }
        offer(candidates[i], rank, begin + key, visible, task.k, scratch.capacity);
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
    if (task.ranks != nullptr)
      __builtin_memcpy(task.ranks + i * task.stride, best.ranks, num_bytes);
  }
}

size_t scratch_bytes(const IndexSelectTask& task) {
  IndexSelectTask measured = task;
  measured.scratch = nullptr;
  return lay_out(measured).num_bytes;
}

void scan(const IndexSelectTask& task) {
  switch (unit_of(task)) {
    case Unit::kF32:
      return scan_keys<Unit::kF32>(task);
    case Unit::kPair:
      return scan_keys<kUnitOfBF16>(task);
    case Unit::kQuad:
      return scan_keys<kUnitOfI8>(task);
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
