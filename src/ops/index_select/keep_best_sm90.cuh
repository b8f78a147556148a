// The best k of up to kCandidates candidates, exactly, by 256 threads in shared memory. Only for
// code compiled for sm_90a.
//
// How far ranks lie below the highest one is counted in 2048 bins. The bin that holds the k-th is
// counted again by its next bits until it has no more candidates than there are threads: each of
// those then counts who comes before it, by rank and then position, so that the result does not
// depend on the order of the candidates. Of 4700 candidates, as there usually are, one count is
// enough.
//
// (Two warpgroups that each find the k-th rank of one query bit by bit, with the candidates in
// registers, are 1% slower for 8192 queries at 200K. Candidates in registers from pass to pass
// spill here.)
#pragma once

#include <climits>
#include <cstdint>

#include "ops/index_select/scores_sm90.cuh"
#include "ops/kit/sm90_barrier.cuh"

namespace indexcache::sm90 {

inline constexpr int kCandidates = 8192;

// The rank of a score in the upper half, the complement of its position in the lower: the better
// candidate is the higher number. No candidate is 0.
using Candidate = uint64_t;

__device__ __forceinline__ Candidate make_candidate(uint32_t rank, uint32_t position) {
  return static_cast<uint64_t>(rank) << 32 | ~position;
}
__device__ __forceinline__ uint32_t rank_of(Candidate c) { return static_cast<uint32_t>(c >> 32); }
__device__ __forceinline__ uint32_t position_of(Candidate c) { return ~static_cast<uint32_t>(c); }

// Shared memory that the threads need.
struct KeepBestScratch {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBins = 2048, kBinBits = 11;
  alignas(16) Candidate candidates[kCandidates];
  alignas(16) uint32_t bins[kBins + 4];  // and one for what is in none
  alignas(16) Candidate list[kThreads];
  alignas(16) uint32_t parts[2][kWarps];  // in turn, so that one barrier a sum is enough
  Candidate least;
  uint32_t list_size;
  uint32_t found[3];
};

// What the threads, numbered from 0, do together; `barrier` is their named barrier.
struct KeepBest {
  KeepBestScratch& scratch;
  int barrier;
  int thread;
  int half = 0;
  int begin = 0, end = 0;  // candidates of this warp

  // Keeps the best min(n, k) of candidates[0, n): writes them to its beginning or, where
  // `positions` is not null, their positions there; both in no order. Returns the least rank kept,
  // to every thread.
  __device__ __forceinline__ uint32_t keep_best(Candidate* candidates, int n, int k,
                                                int32_t* positions) {
    const int run = (n + KeepBestScratch::kThreads - 1) / KeepBestScratch::kThreads * 32;
    begin = min(thread / 32 * run, n);
    end = min(begin + run, n);
    uint32_t low = UINT_MAX, high = 0;
    wait();  // the query before is done with the scratch
    for_own<20>(candidates, [&](int at, Candidate c) {
      if (at < end) scratch.candidates[at] = c;
      low = min(low, rank_of(c) - 1);  // none is above all
      high = max(high, rank_of(c));
    });
    low = minimum(low) + 1;
    high = ~minimum(~high);
    const Candidate least = n > k ? kth_best(low, high, k) : 1;

    uint32_t count = 0, least_rank = UINT_MAX;
    for_own<8>(scratch.candidates, [&](int, Candidate c) {
      count += c >= least;
      least_rank = min(least_rank, c >= least ? rank_of(c) : UINT_MAX);
    });
    uint32_t to = before(__reduce_add_sync(0xFFFFFFFFu, count));
    const unsigned lanes_below = (1u << thread % 32) - 1;
    const auto place = [&](bool keep) {
      const unsigned who = __ballot_sync(0xFFFFFFFFu, keep);
      const uint32_t at = to + __popc(who & lanes_below);
      to += __popc(who);
      return at;
    };
    if (positions != nullptr) {
      for_own<8>(scratch.candidates, [&](int, Candidate c) {
        const uint32_t at = place(c >= least);
        if (c >= least) positions[at] = static_cast<int32_t>(position_of(c));
      });
    } else {
      for_own<8>(scratch.candidates, [&](int, Candidate c) {
        const uint32_t at = place(c >= least);
        if (c >= least) candidates[at] = c;
      });
    }
    return minimum(least_rank);
  }

 private:
  // Calls visit(index, candidate) for the warp's run, a lane each, and for a few that are not there
  // (0), reading kAtOnce at a time.
  template <int kAtOnce, class Visit>
  __device__ __forceinline__ void for_own(const Candidate* from, const Visit& visit) const {
#pragma unroll 1
    for (int first = begin; first < end; first += 32 * kAtOnce) {
      Candidate own[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + thread % 32 + 32 * i;
        own[i] = 0;
        if (at < end) own[i] = from[at];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) visit(first + thread % 32 + 32 * i, own[i]);
    }
  }

  __device__ __forceinline__ void wait() { named_barrier(barrier, KeepBestScratch::kThreads); }

  // One value a warp; each call takes the next half of the scratch.
  __device__ __forceinline__ void share(uint32_t part, uint32_t (&parts)[KeepBestScratch::kWarps]) {
    if (thread % 32 == 0) scratch.parts[half][thread / 32] = part;
    wait();
    const uint4* from = reinterpret_cast<const uint4*>(scratch.parts[half]);
    const uint4 a = from[0], b = from[1];
    parts[0] = a.x, parts[1] = a.y, parts[2] = a.z, parts[3] = a.w;
    parts[4] = b.x, parts[5] = b.y, parts[6] = b.z, parts[7] = b.w;
    half ^= 1;
  }
  __device__ __forceinline__ uint32_t minimum(uint32_t x) {
    uint32_t parts[KeepBestScratch::kWarps];
    share(__reduce_min_sync(0xFFFFFFFFu, x), parts);
    x = parts[0];
#pragma unroll
    for (int i = 1; i < KeepBestScratch::kWarps; ++i) x = min(x, parts[i]);
    return x;
  }
  // The sum of the warps before this one.
  __device__ __forceinline__ uint32_t before(uint32_t of_warp) {
    const int warp = thread / 32;
    uint32_t parts[KeepBestScratch::kWarps], sum = 0;
    share(of_warp, parts);
#pragma unroll
    for (int i = 0; i < KeepBestScratch::kWarps - 1; ++i) sum += i < warp ? parts[i] : 0;
    return sum;
  }

  // Not above the k-th best of more candidates than that, and above the next one.
  __device__ __forceinline__ Candidate kth_best(uint32_t low, uint32_t high, int k) {
    constexpr int kBins = KeepBestScratch::kBins, kOwnBins = kBins / KeepBestScratch::kThreads;
    static_assert(kOwnBins == 8);
    const int lane = thread % 32;
    // In the bin are the candidates whose distance to `high` is `prefix` above bit `shift`.
    int shift = max(0, 32 - __clz(high - low) - KeepBestScratch::kBinBits);
    uint32_t prefix = 0, wanted = k, count = 0;
    uint4* own_bins = reinterpret_cast<uint4*>(scratch.bins) + thread * 2;
    while (true) {
      own_bins[0] = own_bins[1] = make_uint4(0, 0, 0, 0);
      wait();
      for_own<8>(scratch.candidates, [&](int, Candidate c) {
        // What is not there is further from `high` than any bin: its rank is 0.
        const uint32_t bin = ((high - rank_of(c)) >> shift) - prefix;
        atomicAdd(&scratch.bins[c == 0 ? kBins : min(bin, kBins)], 1u);
      });
      wait();
      const uint4 a = own_bins[0], b = own_bins[1];
      const uint32_t bins[kOwnBins] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      uint32_t total = 0;
#pragma unroll
      for (int i = 0; i < kOwnBins; ++i) total += bins[i];
      uint32_t inclusive = total;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
        if (lane >= step) inclusive += other;
      }
      uint32_t above = inclusive - total + before(__shfl_sync(0xFFFFFFFFu, inclusive, 31));
      if (above < wanted && above + total >= wanted) {
#pragma unroll
        for (int i = 0; i < kOwnBins; ++i) {
          if (above < wanted && above + bins[i] >= wanted) {
            scratch.found[0] = thread * kOwnBins + i;
            scratch.found[1] = wanted - above;
            scratch.found[2] = bins[i];
          }
          above += bins[i];
        }
        scratch.list_size = 0;
      }
      wait();
      prefix += scratch.found[0];
      wanted = scratch.found[1];
      count = scratch.found[2];
      if (count == wanted || count <= KeepBestScratch::kThreads || shift == 0) break;
      const int next = max(0, shift - KeepBestScratch::kBinBits);
      prefix <<= shift - next;
      shift = next;
    }

    if (count == wanted) {
      const uint32_t distance = (prefix << shift) + ((1u << shift) - 1);
      return distance >= high ? 1 : static_cast<uint64_t>(high - distance) << 32;
    }
    const auto in_bin = [&](Candidate c) {
      return c != 0 && (high - rank_of(c)) >> shift == prefix;
    };
    if (count <= KeepBestScratch::kThreads) {
      for_own<8>(scratch.candidates, [&](int, Candidate c) {
        if (in_bin(c)) scratch.list[atomicAdd(&scratch.list_size, 1u)] = c;
      });
      wait();
      if (thread < count) {
        const Candidate mine = scratch.list[thread];
        uint32_t better = 0;
#pragma unroll 8
        for (uint32_t i = 0; i < count; ++i) better += scratch.list[i] > mine;
        if (better + 1 == wanted) scratch.least = mine;
      }
      wait();
      return scratch.least;
    }
    // Many ties at one rank: the first `wanted` of them by position.
    uint32_t last = 0;
    for (int bit = 30; bit >= 0; --bit) {
      const uint32_t tried = last | 1u << bit;
      uint32_t earlier = 0;
      for_own<8>(scratch.candidates,
                 [&](int, Candidate c) { earlier += in_bin(c) && position_of(c) < tried; });
      uint32_t parts[KeepBestScratch::kWarps];
      share(__reduce_add_sync(0xFFFFFFFFu, earlier), parts);
      earlier = 0;
#pragma unroll
      for (int i = 0; i < KeepBestScratch::kWarps; ++i) earlier += parts[i];
      if (earlier < wanted) last = tried;
    }
    return make_candidate(high - prefix, last);
  }
};

}  // namespace indexcache::sm90
