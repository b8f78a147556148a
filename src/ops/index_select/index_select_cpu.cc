// Scores are made in tiles of a few keys against vectors of kLanes (query, head) rows: the rows are
// packed so that lane i of panel vector u holds 32-bit unit u (a bf16 pair, or one f32) of row i,
// and each unit of a key is broadcast straight from the cache row. No key is ever copied or
// transposed, and one broadcast serves two panels.
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

bool uses_dot(const IndexSelectTask& task) { return kHasDot && task.bf16_keys; }

struct Scratch {
  uint8_t* panels;  // [panels][units][kLanes] 32-bit units
  int32_t* rows;    // [kLanes][units rounded up]: what is about to be packed
  float* weights;   // [num_heads][kLanes], lanes = queries
  float* sums;      // lanes = queries: [kStripe][kLanes]; lanes = heads: [kLanes queries][kStripe]
  float* products;  // lanes = heads: [2][kStripe][kLanes]
  float* wide;      // [kStripe][head_dim]: bf16 keys as f32
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
// The first half of the lanes, for up to 8 heads: where 512 bits are worked off as two times 256,
// in half the time.
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
  const float* panel = reinterpret_cast<const float*>(panels);
  for (int64_t u = 0; u < units; ++u) {
    typename Lanes::Type rows_of_q[kPanels];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) rows_of_q[p] = Lanes::load(panel + (p * units + u) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        dots[p][i] = Lanes::multiply_add(dots[p][i], rows_of_q[p],
                                         bases[i / kOffsets] + offsets[i % kOffsets]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys / kOffsets; ++i) bases[i] += 4;
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
template <bool kDot, int kPanels, int kKeys>
void add_heads(const Stripe& stripe, const uint8_t* panels, const float* weights, bool first,
               float* sums) {
  for (int64_t key = 0; key < kStripe; key += kKeys) {
    if (first) prefetch(stripe, key, kKeys);
    Vec dots[kPanels][kKeys];
    relu_dots<Whole<kDot>>(panels, stripe.units, stripe.keys + key * stripe.row_bytes,
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

template <bool kDot>
void score_lanes_are_queries(const IndexSelectTask& task, const Scratch& scratch,
                             const Stripe& stripe) {
  const int64_t panel_bytes = stripe.units * kLanes * 4;
  int64_t h = 0;
  for (; h + 2 <= task.num_heads; h += 2) {
    add_heads<kDot, 2, kKeys2>(stripe, scratch.panels + h * panel_bytes,
                               scratch.weights + h * kLanes, h == 0, scratch.sums);
  }
  if (h < task.num_heads) {
    add_heads<kDot, 1, kKeys1>(stripe, scratch.panels + h * panel_bytes,
                               scratch.weights + h * kLanes, h == 0, scratch.sums);
  }
}

// Panels are taken two at a time, be they of one query or of two.
template <bool kDot>
void score_lanes_are_heads(const IndexSelectTask& task, const Scratch& scratch,
                           const Stripe& stripe) {
  const int64_t panel_bytes = stripe.units * kLanes * 4;
  const int64_t groups = (task.num_heads + kLanes - 1) / kLanes;
  const int64_t num_panels = groups * task.num_queries;
  for (int64_t i = 0; i < task.num_queries * kStripe; i += kLanes) {
    vec_store(scratch.sums + i, vec_zero());
  }
  const bool half = 2 * task.num_heads <= kLanes;
  for (int64_t panel = 0; panel < num_panels; panel += 2) {
    const uint8_t* panels = scratch.panels + panel * panel_bytes;
    const int64_t n = num_panels - panel < 2 ? 1 : 2;
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
    candidates[i] = {scratch.ranks + i * scratch.capacity, scratch.positions + i * scratch.capacity,
                     0, INT32_MIN};
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
