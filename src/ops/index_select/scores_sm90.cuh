// What the Hopper kernels of the indexer share: the order of scores, the sum over heads, and how a
// token finds its sequence. Only for code compiled for sm_90a.
#pragma once

#include <cstdint>

#include "ops/kit/paged.h"

namespace indexcache::sm90 {

// Unsigned integers in the order of the scores; NaN equals -infinity and -0 equals 0. No score has
// rank 0.
__device__ __forceinline__ uint32_t rank_of_score(float score) {
  const float value = score != score ? __uint_as_float(0xFF800000u) : __fadd_rn(score, 0.0f);
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float score_of_rank(uint32_t rank) {
  return __uint_as_float(rank ^ ((rank >> 31) != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// The highest number below a score; NaN below -infinity.
__device__ __forceinline__ float below_score(float score) {
  const uint32_t rank = rank_of_score(score) - 1;
  return score_of_rank(rank == 0x7FFFFFFFu ? rank - 1 : rank);  // -0 is not below 0
}

// The products of one warpgroup, 64 keys by kColumns (query, head) pairs with a query's heads side
// by side, become scores but for the key's scale. A thread has two keys (rows) and, of every query,
// the heads 8 j + 2 (lane % 4) + {0, 1}; weights[2 j + e] goes with column 8 j + 2 (lane % 4) + e
// and holds half of the weight, because relu is taken as (x + |x|) / 2: that runs on the pipe with
// twice the rate of a maximum, is exact, and lets NaN through.
//
// The four lanes of a quad then add their parts and share the sums out: sums 2 query + row, of
// which lane % 4 = c keeps kOwn from (c / 2 * 2 + c % 2) * kOwn on. With two sums the odd lanes
// hold a copy.
template <int kHeads, int kColumns>
struct HeadSums {
  static constexpr int kQueries = kColumns / kHeads;
  static constexpr int kSums = 2 * kQueries;
  static constexpr int kOwn = kSums >= 4 ? kSums / 4 : 1;
  // Queries that a thread has a part in after sharing out, and how its sums map to them.
  static constexpr int kOwnQueries = kOwn >= 2 ? kOwn / 2 : 1;

  // Of sum i of the lane with lane % 4 = c.
  __device__ static __forceinline__ int query(int c, int i) {
    return kSums >= 4 ? (c * kOwn + i) / 2 : 0;
  }
  __device__ static __forceinline__ int row(int c, int i) {
    return kSums >= 4 ? (c * kOwn + i) % 2 : c / 2;
  }
  __device__ static __forceinline__ bool writes(int c) { return kSums >= 4 || c % 2 == 0; }

  __device__ static __forceinline__ void run(const float (&products)[kColumns / 2],
                                             const float (&weights)[kColumns / 4], int c,
                                             float (&own)[kOwn]) {
    float sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const int query = 8 * j / kHeads;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float x = products[4 * j + 2 * row + e];
          sums[2 * query + row] = fmaf(x + fabsf(x), weights[2 * j + e], sums[2 * query + row]);
        }
      }
    }
    float half[kSums / 2];
    const bool upper = (c & 2) != 0;
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const float keep = upper ? sums[kSums / 2 + i] : sums[i];
      const float send = upper ? sums[i] : sums[kSums / 2 + i];
      half[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, send, 2);
    }
    if constexpr (kSums >= 4) {
      const bool odd = (c & 1) != 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float keep = odd ? half[kOwn + i] : half[i];
        const float send = odd ? half[i] : half[kOwn + i];
        own[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, send, 1);
      }
    } else {
      own[0] = half[0] + __shfl_xor_sync(0xFFFFFFFFu, half[0], 1);
    }
  }
};

// The run that token `token` of the batch belongs to. Runs cover the batch in order.
__device__ __forceinline__ int sequence_of(const SeqSpan* seqs, int num_seqs, int64_t token) {
  int low = 0, high = num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (seqs[middle].token_begin <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  // Empty runs begin where the next one does: of those the last is found, which is not empty unless
  // it is the last of all.
  return low;
}

}  // namespace indexcache::sm90
