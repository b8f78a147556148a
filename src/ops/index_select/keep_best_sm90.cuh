// The best k of up to kCandidates candidates, exactly, by one warpgroup with the candidates in its
// registers. Only for code compiled for sm_90a.
//
// The k-th rank is found bit by bit: one bit is a comparison of every candidate and a sum over the
// warpgroup. It stops as soon as a bound parts exactly k; ties at the k-th rank are parted by
// position in the same way, so the result does not depend on the order of the candidates.
#pragma once

#include <climits>
#include <cstdint>

#include "ops/index_select/scores_sm90.cuh"
#include "ops/kit/sm90_barrier.cuh"

namespace indexcache::sm90 {

inline constexpr int kCandidates = 8192;
inline constexpr int kCandidatesPerThread = kCandidates / 128;

struct Candidate {
  uint32_t rank;  // of the score; 0 is no candidate
  uint32_t position;
};

// Shared memory that one warpgroup needs.
struct KeepBestScratch {
  uint32_t parts[2][4];  // of the four warps, in turn, so that one barrier a sum is enough
};

// Sums and extrema over the warpgroup whose named barrier is `barrier`. Each call takes the next
// half of the scratch.
struct WarpgroupReduce {
  KeepBestScratch* scratch;
  int barrier;
  int thread;  // of the warpgroup
  int half = 0;

  __device__ __forceinline__ uint4 share(uint32_t part) {
    if (thread % 32 == 0) scratch->parts[half][thread / 32] = part;
    named_barrier(barrier, 128);
    const uint4 parts = *reinterpret_cast<const uint4*>(scratch->parts[half]);
    half ^= 1;
    return parts;
  }
  __device__ __forceinline__ uint32_t sum(uint32_t x) {
    const uint4 p = share(__reduce_add_sync(0xFFFFFFFFu, x));
    return p.x + p.y + p.z + p.w;
  }
  __device__ __forceinline__ uint32_t min(uint32_t x) {
    const uint4 p = share(__reduce_min_sync(0xFFFFFFFFu, x));
    return ::min(::min(p.x, p.y), ::min(p.z, p.w));
  }
  __device__ __forceinline__ uint32_t max(uint32_t x) {
    const uint4 p = share(__reduce_max_sync(0xFFFFFFFFu, x));
    return ::max(::max(p.x, p.y), ::max(p.z, p.w));
  }
  // Of the threads before this one.
  __device__ __forceinline__ uint32_t sum_before(uint32_t x) {
    uint32_t inclusive = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
      if (thread % 32 >= step) inclusive += other;
    }
    const uint4 p = share(__shfl_sync(0xFFFFFFFFu, inclusive, 31));
    const int warp = thread / 32;
    return inclusive - x + (warp > 0 ? p.x : 0) + (warp > 1 ? p.y : 0) + (warp > 2 ? p.z : 0);
  }
};

// Keeps the best min(n, k) of candidates[0, n). With `out` null they are written to the beginning
// of `candidates`, else their positions go to `out`; both in no order. Returns the least rank kept.
__device__ __forceinline__ uint32_t keep_best(Candidate* candidates, int n, int k, int32_t* out,
                                              WarpgroupReduce& reduce) {
  uint32_t ranks[kCandidatesPerThread], positions[kCandidatesPerThread];
#pragma unroll
  for (int i = 0; i < kCandidatesPerThread; ++i) {
    const int at = i * 128 + reduce.thread;
    uint2 candidate = {0, 0};
    if (at < n) candidate = *reinterpret_cast<const uint2*>(candidates + at);
    ranks[i] = candidate.x;
    positions[i] = candidate.y;
  }

  uint32_t bound = 1;        // kept: ranks above it, and of those equal to it ...
  uint32_t last = UINT_MAX;  // ... the positions up to here
  if (n > k) {
    uint32_t low = UINT_MAX, high = 0;
#pragma unroll
    for (int i = 0; i < kCandidatesPerThread; ++i) {
      if (ranks[i] != 0) low = min(low, ranks[i]);
      high = max(high, ranks[i]);
    }
    low = reduce.min(low);
    high = reduce.max(high);
    // The common leading bits, then the rest bit by bit: `bound` is the highest with at least k
    // ranks not below it.
    int bit = 31 - __clz(low ^ high);  // -1 if all are equal
    bound = bit < 0 ? low : high >> bit >> 1 << bit << 1;
    uint32_t total = n;  // ranks not below bound
    for (; bit >= 0 && total != static_cast<uint32_t>(k); --bit) {
      const uint32_t tried = bound | 1u << bit;
      uint32_t count = 0;
#pragma unroll
      for (int i = 0; i < kCandidatesPerThread; ++i) count += ranks[i] >= tried;
      count = reduce.sum(count);
      if (count >= static_cast<uint32_t>(k)) {
        bound = tried;
        total = count;
      }
    }
    if (total != static_cast<uint32_t>(k)) {
      uint32_t above = 0;
#pragma unroll
      for (int i = 0; i < kCandidatesPerThread; ++i) above += ranks[i] > bound;
      const uint32_t wanted = k - reduce.sum(above);  // of the ties, those with lowest positions
      last = 0;
      for (bit = 30; bit >= 0; --bit) {
        const uint32_t tried = last | 1u << bit;
        uint32_t count = 0;
#pragma unroll
        for (int i = 0; i < kCandidatesPerThread; ++i)
          count += ranks[i] == bound && positions[i] < tried;
        if (reduce.sum(count) < wanted) last = tried;
      }
    }
  }

  uint32_t kept = 0, least = UINT_MAX;
#pragma unroll
  for (int i = 0; i < kCandidatesPerThread; ++i) {
    const bool keep = ranks[i] > bound || (ranks[i] == bound && positions[i] <= last);
    if (!keep) ranks[i] = 0;
    if (keep) least = min(least, ranks[i]);
    kept += keep;
  }
  uint32_t to = reduce.sum_before(kept);
#pragma unroll
  for (int i = 0; i < kCandidatesPerThread; ++i) {
    if (ranks[i] == 0) continue;
    if (out != nullptr) {
      out[to] = static_cast<int32_t>(positions[i]);
    } else {
      *reinterpret_cast<uint2*>(candidates + to) = {ranks[i], positions[i]};
    }
    ++to;
  }
  return reduce.min(least);
}

}  // namespace indexcache::sm90
