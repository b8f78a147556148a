// The best k of a stream of scores, exactly. Only *_cpu.cc files may include it.
//
// Candidates above the query's threshold are appended to its buffer in order of position. A full
// buffer is cut to its best k, which raises the threshold to the k-th best rank so far; later
// positions lose ties, so from then on only strictly better ones enter.
#pragma once

#include "ops/index_select/index_select_vec.h"

namespace indexcache {
namespace INDEXCACHE_ISA {

namespace {

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

// Keeps the best k of n >= k; returns a rank that later candidates must exceed to be among the best
// k.
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
  // Bisection: at least k ranks are >= least, fewer than k are >= end. It may stop early, below the
  // k-th best rank, at a bound that parts exactly k.
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

INDEXCACHE_INLINE void append(Candidates& to, uint32_t mask, IVec ranks, int64_t position,
                              int64_t k, int64_t capacity) {
  ivec_store(to.ranks + to.count, ivec_compress(mask, ranks));
  ivec_store(to.positions + to.count,
             ivec_compress(mask, ivec_add(ivec_iota(), ivec_set(static_cast<int32_t>(position)))));
  to.count += __builtin_popcount(mask);
  if (to.count > capacity - 2 * kLanes) {  // room for kLanes more and for kLanes of padding
    to.threshold = keep_best_ranks(to.ranks, to.positions, to.count, k);
    to.count = k;
  }
}

// Takes the candidates among kLanes keys from `position` on, of which the query sees the first
// `visible`.
INDEXCACHE_INLINE void offer(Candidates& to, IVec ranks, int64_t position, int64_t visible,
                             int64_t k, int64_t capacity) {
  uint32_t mask = ivec_gt(ranks, ivec_set(to.threshold));
  if (visible < kLanes) mask &= visible > 0 ? (1u << visible) - 1 : 0;
  if (mask != 0) append(to, mask, ranks, position, k, capacity);
}

}  // namespace
}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
