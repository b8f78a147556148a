// Prefill: scores of many queries and the best k of them in one pass over the keys.
//
// Floor, for 8192 queries, 200K keys, 32 heads: 13.4 TFLOP of e4m3 products, 10.3 ms at the 1300
// TFLOP/s a large product reaches on an H100; 5.2e10 relu-multiply-adds of two instructions, 3.7 ms
// of the FMA pipes at 1.7 GHz; keys from L2 once per 8 queries, 27 GB, 5 ms at 5.5 TB/s. All three
// overlap. Candidates: about k (1 + ln(context / k)) a query, 0.1e9 in all, under 1 GB written.
//
// A block of 384 threads owns 256 columns, that is 256 / heads neighbouring queries of one
// sequence, and streams over all keys that they see: one warp copies pages of 64 keys (whole pages
// are exactly the M of the matrix instruction) with the copy engine, even pages for one math
// warpgroup and odd ones for the other. A math warpgroup multiplies a page with the columns in two
// halves of 128; while one half is in the tensor cores, the other is reduced to scores in
// registers. Scores above the query's threshold are appended to the query's candidates in global
// memory (L2). Every 4096 keys the two warpgroups meet, and queries whose candidates might overflow
// in the next 4096 are cut to their best k, which raises the threshold. At a meeting every earlier
// key has been seen, so later keys lose ties and only strictly better scores enter.
//
// What is left at the end is cut to k, and a second small kernel sorts each row by position.
#include <algorithm>

#include "device/previous_kernel.cuh"
#include "ops/index_select/index_select_sm90.cuh"
#include "ops/index_select/keep_best_sm90.cuh"
#include "ops/index_select/scores_sm90.cuh"
#include "ops/kit/sm90_barrier.cuh"
#include "ops/kit/sm90_tma.cuh"
#include "ops/kit/sm90_wgmma.cuh"

namespace indexcache::sm90 {
namespace {

constexpr int kColumns = 256, kHalf = 128;
constexpr int kStages = 6;  // pages in flight for each math warpgroup
constexpr int kTileBytes = kPageTokens * kIndexDim;
constexpr int kScaleBytes = kPageTokens * 4;
constexpr int kRoundTiles = 32;  // of each math warpgroup between two meetings
constexpr int kRoundKeys = 2 * kRoundTiles * kPageTokens;
static_assert(kMaxIndexTopK + kRoundKeys <= kCandidates);

template <int kHeads>
constexpr int kBlockQueries = kColumns / kHeads;

struct Shared {
  alignas(1024) uint8_t q[kColumns * kIndexDim];
  alignas(1024) uint8_t keys[2][kStages][kTileBytes];
  alignas(128) float scales[2][kStages][kPageTokens];
  alignas(16) float weights[kColumns];  // halved, see HeadSums
  KeepBestScratch keep_best;
  float thresholds[kColumns / 16];  // only scores above enter; NaN: all do
  int num_candidates[kColumns / 16];
  int last_positions[kColumns / 16];  // that the query sees
  uint64_t q_full, q_empty;
  uint64_t full[2][kStages], empty[2][kStages];
};
static_assert(sizeof(Shared) + 1024 <= 227 * 1024);

struct Params {
  IndexScoreArgs args;
  const float* lower_bounds;
  float* all_scores;
  int64_t scores_stride;
  Candidate* candidates;  // [blocks of the grid][queries of a block][kCandidates]
  int num_blocks;
};

// Of one query of the running block.
template <int kHeads>
__device__ __forceinline__ Candidate* candidates_of(const Params& params, int query) {
  return params.candidates + (blockIdx.x * kBlockQueries<kHeads> + query) * kCandidates;
}

// Neighbouring queries of one sequence, of which at least one sees more than k tokens.
struct QueryBlock {
  const int32_t* pages;
  int token;  // first row of q; < 0: no block
  int num_queries;
  int first_position;  // of the first query
  int num_pages;       // that its last query sees
};

// The blocks of each sequence in order, those with the most keys first.
template <int kHeads>
__device__ QueryBlock find_block(const IndexScoreArgs& args, int index) {
  constexpr int64_t kQueries = kBlockQueries<kHeads>;
  for (int s = 0; s < args.num_seqs; ++s) {
    const SeqSpan& seq = args.seqs[s];
    const int64_t num_blocks = (seq.num_tokens + kQueries - 1) / kQueries;
    // Queries at positions below k see at most k tokens.
    const int64_t skipped_queries =
        min(max(args.k - seq.first_position, int64_t{0}), seq.num_tokens);
    const int64_t skipped =
        skipped_queries == seq.num_tokens ? num_blocks : skipped_queries / kQueries;
    if (index >= num_blocks - skipped) {
      index -= static_cast<int>(num_blocks - skipped);
      continue;
    }
    const int64_t begin = (num_blocks - 1 - index) * kQueries;
    const int64_t count = min(kQueries, seq.num_tokens - begin);
    QueryBlock block;
    block.pages = seq.pages;
    block.token = static_cast<int>(seq.token_begin + begin);
    block.num_queries = static_cast<int>(count);
    block.first_position = static_cast<int>(seq.first_position + begin);
    block.num_pages =
        static_cast<int>((seq.first_position + begin + count + kPageTokens - 1) / kPageTokens);
    return block;
  }
  return {nullptr, -1, 0, 0, 0};
}

// --- the copying warp ---

template <int kHeads>
__device__ void copy_loop(const Params& params, const CUtensorMap& q_map,
                          const CUtensorMap& key_map, Shared& shared) {
  const IndexScoreArgs& args = params.args;
  const int lane = threadIdx.x % 32;
  RingPosition<kStages> even, odd;
  uint32_t q_parity = 0;
  const auto copy_page = [&](int page, int group, RingPosition<kStages>& at) {
    if (lane == 0) {
      uint64_t* full = &shared.full[group][at.stage];
      barrier_wait(&shared.empty[group][at.stage], at.parity ^ 1);
      barrier_arrive_expect(full, kTileBytes + kScaleBytes);
      copy_box(shared.keys[group][at.stage], &key_map, 0, page, full);
      copy_bytes(shared.scales[group][at.stage],
                 args.key_base + page * args.page_bytes + kTileBytes, kScaleBytes, full);
    }
    at.advance();
  };
  for (int index = blockIdx.x; index < params.num_blocks; index += gridDim.x) {
    const QueryBlock block = find_block<kHeads>(args, index);
    if (block.token < 0) break;
    if (lane == 0) {
      barrier_wait(&shared.q_empty, q_parity ^ 1);
      barrier_arrive_expect(&shared.q_full, sizeof(shared.q));
      copy_box(shared.q, &q_map, block.token * kHeads, 0, &shared.q_full);
    }
    q_parity ^= 1;
    int next = lane < block.num_pages ? block.pages[lane] : 0;
    for (int first = 0; first < block.num_pages; first += 32) {
      const int current = next;
      if (first + 32 + lane < block.num_pages) next = block.pages[first + 32 + lane];
      const int count = min(32, block.num_pages - first);
      for (int i = 0; i < count; i += 2) {
        copy_page(__shfl_sync(0xFFFFFFFFu, current, i), 0, even);
        if (i + 1 < count) copy_page(__shfl_sync(0xFFFFFFFFu, current, i + 1), 1, odd);
      }
    }
  }
}

// --- the math warpgroups ---

// Half `half` of the columns times the keys of one page.
__device__ __forceinline__ void start_products(float (&products)[kHalf / 2], const Shared& shared,
                                               int group, int stage, int half) {
  const uint64_t a = panel_k_major(shared.keys[group][stage]);
  const uint64_t b = panel_k_major(shared.q + half * kHalf * kIndexDim);
  mma_landed(products);
  mma_begin();
#pragma unroll
  for (int step = 0; step < kIndexDim / 32; ++step) {
    mma_e4m3(products, a + step * kNextUnits, b + step * kNextUnits, step > 0);
  }
  mma_commit();
}

template <int kHeads, bool kAllScores>
struct Scorer {
  using Sums = HeadSums<kHeads, kHalf>;

  const Params& params;
  Shared& shared;
  const QueryBlock& block;
  int row;  // first of the two keys of a page that this thread has
  int c;    // lane % 4
  float thresholds[2][Sums::kOwnQueries];

  __device__ __forceinline__ void read_thresholds() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Sums::kOwnQueries; ++i) {
        thresholds[half][i] =
            shared
                .thresholds[half * Sums::kQueries + Sums::query(c, 2 * i < Sums::kOwn ? 2 * i : 0)];
      }
    }
  }

  __device__ __forceinline__ void append(float score, int query, int position, float threshold) {
    if (position > shared.last_positions[query]) return;
    // NaN counts as -infinity, which is above no threshold that is set.
    if (score != score && threshold == threshold) return;
    const int slot = atomicAdd(&shared.num_candidates[query], 1);
    candidates_of<kHeads>(params, query)[slot] =
        make_candidate(rank_of_score(score), static_cast<uint32_t>(position));
  }

  __device__ __forceinline__ void offer(const float (&products)[kHalf / 2],
                                        const float (&weights)[kHalf / 4], int half, int page_begin,
                                        const float (&scales)[2]) {
    float own[Sums::kOwn];
    Sums::run(products, weights, c, own);
#pragma unroll
    for (int i = 0; i < Sums::kOwn; ++i) {
      const int sum_row = Sums::row(c, i);
      const float score = own[i] * (sum_row == 0 ? scales[0] : scales[1]);
      if constexpr (kAllScores) {
        const int query = half * Sums::kQueries + Sums::query(c, i);
        const int position = page_begin + row + 8 * sum_row;
        if (Sums::writes(c) && query < block.num_queries &&
            position <= block.first_position + query) {
          params.all_scores[(block.token + query) * params.scores_stride + position] = score;
        }
      }
      const float threshold = thresholds[half][i / 2];
      if (!(score <= threshold) && Sums::writes(c)) {
        append(score, half * Sums::kQueries + Sums::query(c, i), page_begin + row + 8 * sum_row,
               threshold);
      }
    }
  }
};

template <int kHeads, bool kAllScores>
__device__ void math_loop(const Params& params, Shared& shared) {
  using Work = Scorer<kHeads, kAllScores>;
  constexpr int kQueries = kBlockQueries<kHeads>;
  constexpr int kBothGroups = 1;  // a named barrier
  const IndexScoreArgs& args = params.args;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  KeepBest keep{shared.keep_best, kBothGroups, static_cast<int>(threadIdx.x)};
  RingPosition<kStages> at;
  uint32_t q_parity = 0;

  for (int index = blockIdx.x; index < params.num_blocks; index += gridDim.x) {
    const QueryBlock block = find_block<kHeads>(args, index);
    if (block.token < 0) break;
    named_barrier(kBothGroups, 256);  // the block before is done with what is set here
    {
      const int query = threadIdx.x / kHeads;
      shared.weights[threadIdx.x] =
          query < block.num_queries
              ? 0.5f * args.weights[static_cast<int64_t>(block.token) * kHeads + threadIdx.x]
              : 0.0f;
    }
    if (threadIdx.x < kQueries) {
      const int query = threadIdx.x;
      // Rows that are not there, and those that see no more than k tokens, take no candidates.
      const bool wanted = query < block.num_queries && block.first_position + query >= args.k;
      float threshold = __uint_as_float(wanted ? 0x7FC00000u : 0x7F800000u);
      if (wanted && params.lower_bounds != nullptr) {
        threshold = below_score(params.lower_bounds[block.token + query]);
      }
      shared.thresholds[query] = threshold;
      shared.num_candidates[query] = 0;
      shared.last_positions[query] = block.first_position + query;
    }
    named_barrier(kBothGroups, 256);
    barrier_wait(&shared.q_full, q_parity);
    q_parity ^= 1;

    Work work{params, shared, block, thread / 32 * 16 + lane / 4, lane % 4};
    const int num_tiles = (block.num_pages + 1 - group) / 2;
    const int num_rounds = (block.num_pages + 2 * kRoundTiles - 1) / (2 * kRoundTiles);
    for (int round = 0; round < num_rounds; ++round) {
      const int begin = round * kRoundTiles, end = min(begin + kRoundTiles, num_tiles);
      if (begin < end) {
        float weights[2][kHalf / 4];
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) {
          const float2 pair = *reinterpret_cast<const float2*>(&shared.weights[8 * i + 2 * work.c]);
          weights[i / (kHalf / 8)][2 * (i % (kHalf / 8))] = pair.x;
          weights[i / (kHalf / 8)][2 * (i % (kHalf / 8)) + 1] = pair.y;
        }
        work.read_thresholds();

        // One half is always in the tensor cores while the other is reduced. (With two in flight
        // around the loop, ptxas 13.0 puts a wait behind every instruction.)
        float first[kHalf / 2], second[kHalf / 2];
        barrier_wait(&shared.full[group][at.stage], at.parity);
        start_products(first, shared, group, at.stage, 0);
        for (int tile = begin; tile + 1 < end; ++tile) {
          const uint32_t stage = at.stage;
          const int page_begin = (2 * tile + group) * static_cast<int>(kPageTokens);
          const float scales[2] = {shared.scales[group][stage][work.row],
                                   shared.scales[group][stage][work.row + 8]};
          mma_wait<0>();
          mma_landed(first);
          start_products(second, shared, group, stage, 1);
          work.offer(first, weights[0], 0, page_begin, scales);
          at.advance();
          barrier_wait(&shared.full[group][at.stage], at.parity);
          mma_wait<0>();
          mma_landed(second);
          barrier_arrive(&shared.empty[group][stage]);
          start_products(first, shared, group, at.stage, 0);
          work.offer(second, weights[1], 1, page_begin, scales);
        }
        const int page_begin = (2 * (end - 1) + group) * static_cast<int>(kPageTokens);
        const float scales[2] = {shared.scales[group][at.stage][work.row],
                                 shared.scales[group][at.stage][work.row + 8]};
        mma_wait<0>();
        mma_landed(first);
        start_products(second, shared, group, at.stage, 1);
        work.offer(first, weights[0], 0, page_begin, scales);
        mma_wait<0>();
        mma_landed(second);
        barrier_arrive(&shared.empty[group][at.stage]);
        at.advance();
        work.offer(second, weights[1], 1, page_begin, scales);
      }
      const bool last = round + 1 == num_rounds;
      if (last) barrier_arrive(&shared.q_empty);
      named_barrier(kBothGroups, 256);
      for (int query = 0; query < kQueries; ++query) {
        const int n = shared.num_candidates[query];
        // `n` is 0 for rows that take no candidates.
        if (last ? n == 0 : n <= kCandidates - kRoundKeys) continue;
        int32_t* positions =
            last ? args.positions + static_cast<int64_t>(block.token + query) * args.k : nullptr;
        const uint32_t least =
            keep.keep_best(candidates_of<kHeads>(params, query), n, args.k, positions);
        if (threadIdx.x == 0) {
          shared.num_candidates[query] = args.k;
          shared.thresholds[query] = score_of_rank(least);
        }
      }
      named_barrier(kBothGroups, 256);
    }
  }
}

template <int kHeads, bool kAllScores>
__global__ void __launch_bounds__(384, 1)
    score_and_select(const __grid_constant__ Params params,
                     const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap key_map) {
  wait_for_previous();
  extern __shared__ uint8_t dynamic_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(
      dynamic_memory + (1024 - shared_address(dynamic_memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    prefetch_map(&q_map);
    prefetch_map(&key_map);
    barrier_init(&shared.q_full, 1);
    barrier_init(&shared.q_empty, 256);
    for (int group = 0; group < 2; ++group) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(&shared.full[group][stage], 1);
        barrier_init(&shared.empty[group][stage], 128);
      }
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    give_registers<40>();
    if (threadIdx.x < 256 + 32) copy_loop<kHeads>(params, q_map, key_map, shared);
  } else {
    take_registers<232>();
    math_loop<kHeads, kAllScores>(params, shared);
  }
}

// --- rows in order of position ---

constexpr int kSortThreads = 256;
constexpr int kWindow = 7 << 15;  // positions whose bits are in shared memory at a time

// One block a token. A row's positions become bits, which are read back in order. Tokens that see
// no more than k others get them all.
__global__ void __launch_bounds__(kSortThreads) sort_rows(const IndexScoreArgs args) {
  wait_for_previous();
  __shared__ uint32_t bits[kWindow / 32];
  __shared__ int32_t row[kMaxIndexTopK];
  __shared__ int warp_counts[kSortThreads / 32];
  const int64_t token = blockIdx.x;
  const SeqSpan seq = args.seqs[sequence_of(args.seqs, args.num_seqs, token)];
  const int64_t visible = seq.first_position + token - seq.token_begin + 1;
  int32_t* out = args.positions + token * args.k;
  const int k = args.k;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0) args.counts[token] = static_cast<int32_t>(min(static_cast<int64_t>(k), visible));
  if (visible <= k) {
    for (int i = thread; i < k; i += kSortThreads) out[i] = i < visible ? i : -1;
    return;
  }
  for (int i = thread; i < k; i += kSortThreads) row[i] = out[i];
  int written = 0;
  for (int64_t begin = 0; begin < visible; begin += kWindow) {
    const int words =
        static_cast<int>((min(visible - begin, static_cast<int64_t>(kWindow)) + 31) / 32);
    __syncthreads();
    for (int i = thread; i < words; i += kSortThreads) bits[i] = 0;
    __syncthreads();
    for (int i = thread; i < k; i += kSortThreads) {
      const int64_t at = row[i] - begin;
      if (at >= 0 && at < kWindow) atomicOr(&bits[at / 32], 1u << (at % 32));
    }
    __syncthreads();
    // A warp has a run of words, which it reads 32 at a time.
    const int run = (words + kSortThreads / 32 * 32 - 1) / (kSortThreads / 32 * 32) * 32;
    const int run_begin = min(warp * run, words), run_end = min(run_begin + run, words);
    int count = 0;
    for (int i = run_begin + lane; i < run_end; i += 32) count += __popc(bits[i]);
    count = __reduce_add_sync(0xFFFFFFFFu, count);
    if (lane == 0) warp_counts[warp] = count;
    __syncthreads();
    int to = written;
    for (int i = 0; i < kSortThreads / 32; ++i) {
      if (i < warp) to += warp_counts[i];
      written += warp_counts[i];
    }
    for (int i = run_begin; i < run_end; i += 32) {
      uint32_t word = i + lane < run_end ? bits[i + lane] : 0;
      const int own = __popc(word);
      int inclusive = own;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
        if (lane >= step) inclusive += other;
      }
      for (int at = to + inclusive - own; word != 0; word &= word - 1, ++at) {
        if (at < k) out[at] = static_cast<int32_t>(begin + (i + lane) * 32 + __ffs(word) - 1);
      }
      to += __shfl_sync(0xFFFFFFFFu, inclusive, 31);
    }
  }
}

template <int kHeads, bool kAllScores>
cudaError_t start(const Params& params, const CUtensorMap& q_map, const CUtensorMap& key_map,
                  int num_multiprocessors, cudaStream_t stream) {
  const auto kernel = score_and_select<kHeads, kAllScores>;
  const int num_bytes = sizeof(Shared) + 1024;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
  if (status != cudaSuccess) return status;
  const int grid = std::min(params.num_blocks, num_multiprocessors);
  return start_kernel(kernel, dim3(static_cast<unsigned>(grid)), dim3(384),
                      static_cast<size_t>(num_bytes), stream, true, params, q_map, key_map);
}

template <int kHeads>
cudaError_t start_for(const Params& params, const CUtensorMap& q_map, const CUtensorMap& key_map,
                      int num_multiprocessors, cudaStream_t stream) {
  return params.all_scores != nullptr
             ? start<kHeads, true>(params, q_map, key_map, num_multiprocessors, stream)
             : start<kHeads, false>(params, q_map, key_map, num_multiprocessors, stream);
}

}  // namespace

int64_t index_select_prefill_workspace(int num_heads, int num_multiprocessors) {
  return static_cast<int64_t>(num_multiprocessors) * (kColumns / num_heads) * kCandidates *
         static_cast<int64_t>(sizeof(Candidate));
}

cudaError_t index_select_prefill(const IndexScoreArgs& args, int num_blocks,
                                 const float* lower_bounds, float* all_scores,
                                 int64_t scores_stride, void* workspace, int num_multiprocessors,
                                 cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;
  if (num_blocks > 0) {
    CUtensorMap q_map, key_map;
    cudaError_t status = map_rows_of_128_bytes(
        &q_map, args.q8, static_cast<int64_t>(args.num_tokens) * args.num_heads, 1,
        static_cast<int64_t>(args.num_tokens) * args.num_heads * kIndexDim, kColumns);
    if (status != cudaSuccess) return status;
    status = map_rows_of_128_bytes(&key_map, args.key_base, kPageTokens, args.num_pool_pages,
                                   args.page_bytes, kPageTokens);
    if (status != cudaSuccess) return status;
    const Params params = {
        args,      lower_bounds, all_scores, scores_stride, static_cast<Candidate*>(workspace),
        num_blocks};
    switch (args.num_heads) {
      case 16:
        status = start_for<16>(params, q_map, key_map, num_multiprocessors, stream);
        break;
      case 32:
        status = start_for<32>(params, q_map, key_map, num_multiprocessors, stream);
        break;
      case 64:
        status = start_for<64>(params, q_map, key_map, num_multiprocessors, stream);
        break;
      case 128:
        status = start_for<128>(params, q_map, key_map, num_multiprocessors, stream);
        break;
      default:
        status = cudaErrorInvalidValue;
    }
    if (status != cudaSuccess) return status;
  }
  return start_kernel(sort_rows, dim3(static_cast<unsigned>(args.num_tokens)), dim3(kSortThreads),
                      0, stream, true, args);
}

}  // namespace indexcache::sm90
