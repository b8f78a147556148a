// Decode: few queries a sequence, so that every key is read for one query or for the few of a
// speculative step.
//
// Floor of the scores, for one query at 200K: 26.4 MB of keys, 8.8 us at 3.0 TB/s; a batch of 8: 70
// us. The products (64 keys by 32 columns) take a tenth of that. The pages of all sequences are one
// list that is cut evenly over the blocks, each of which keeps eight pages in flight.
//
// Floor of the selection: one read of the scores, 0.8 MB a row of 200K, from L2. A cluster of eight
// blocks takes a row: each keeps its part in shared memory, three rounds of histograms of the
// rank's bits find the k-th, and positions come out in order. Latency bound: five cluster barriers.
// (Clusters of 16 take 40 us for a row of 200K, of 8 take 32.)
#include <cooperative_groups.h>

#include <algorithm>

#include "device/previous_kernel.cuh"
#include "ops/index_select/index_select_sm90.cuh"
#include "ops/index_select/scores_sm90.cuh"
#include "ops/kit/sm90_barrier.cuh"
#include "ops/kit/sm90_tma.cuh"
#include "ops/kit/sm90_wgmma.cuh"

namespace indexcache::sm90 {
namespace {

// --- scores ---

constexpr int kStages = 8;
constexpr int kTileBytes = kPageTokens * kIndexDim;
constexpr int kScaleBytes = kPageTokens * 4;
constexpr int kMaxSeqs = 256;
constexpr int kScoreThreads = 256 + 32;  // two math warpgroups and the copying warp

template <int kColumns>
struct ScoreShared {
  alignas(1024) uint8_t keys[kStages][kTileBytes];
  alignas(1024) uint8_t q[2][kColumns * kIndexDim];
  alignas(128) float scales[kStages][kPageTokens];
  int pages_before[kMaxSeqs + 1];  // of the sequences before
  uint64_t full[kStages], empty[kStages];
  uint64_t q_full[2], q_empty[2];
};

struct ScoreParams {
  IndexScoreArgs args;
  float* scores;
  int64_t scores_stride;
};

// By the first warp.
__device__ void count_pages(const IndexScoreArgs& args, int* pages_before) {
  const int lane = threadIdx.x;
  int total = 0;
  for (int first = 0; first < args.num_seqs; first += 32) {
    int pages = 0;
    if (first + lane < args.num_seqs) {
      const SeqSpan& seq = args.seqs[first + lane];
      if (seq.num_tokens > 0) {
        pages =
            static_cast<int>((seq.first_position + seq.num_tokens + kPageTokens - 1) / kPageTokens);
      }
    }
    int inclusive = pages;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    if (first + lane < args.num_seqs) pages_before[first + lane] = total + inclusive - pages;
    total += __shfl_sync(0xFFFFFFFFu, inclusive, 31);
  }
  if (lane == 0) pages_before[args.num_seqs] = total;
}

// Calls visit(sequence, first page, number of pages) for the parts of sequences that are in [begin,
// end) of all pages.
template <class Visit>
__device__ __forceinline__ void for_each_part(const IndexScoreArgs& args, const int* pages_before,
                                              int begin, int end, const Visit& visit) {
  int s = 0;
  while (begin < end) {
    while (pages_before[s + 1] <= begin) ++s;
    const int stop = min(end, pages_before[s + 1]);
    visit(args.seqs[s], begin - pages_before[s], stop - begin);
    begin = stop;
  }
}

template <int kHeads, int kQueries>
__global__ void __launch_bounds__(kScoreThreads, 1)
    score_pages(const __grid_constant__ ScoreParams params,
                const __grid_constant__ CUtensorMap q_map,
                const __grid_constant__ CUtensorMap key_map) {
  wait_for_previous();
  constexpr int kColumns = kHeads * kQueries;
  using Sums = HeadSums<kHeads, kColumns>;
  extern __shared__ uint8_t dynamic_memory[];
  auto& shared = *reinterpret_cast<ScoreShared<kColumns>*>(
      dynamic_memory + (1024 - shared_address(dynamic_memory) % 1024) % 1024);
  const IndexScoreArgs& args = params.args;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) count_pages(args, shared.pages_before);
  if (threadIdx.x == 256) {
    prefetch_map(&q_map);
    prefetch_map(&key_map);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 128);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.q_full[i], 1);
      barrier_init(&shared.q_empty[i], 256);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int64_t total = shared.pages_before[args.num_seqs];
  const int begin = static_cast<int>(total * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);

  if (warp == 8) {
    RingPosition<kStages> at;
    RingPosition<2> q_at;
    for_each_part(
        args, shared.pages_before, begin, end, [&](const SeqSpan& seq, int first, int count) {
          if (lane == 0) {
            uint64_t* full = &shared.q_full[q_at.stage];
            barrier_wait(&shared.q_empty[q_at.stage], q_at.parity ^ 1);
            barrier_arrive_expect(full, kColumns * kIndexDim);
            copy_box(shared.q[q_at.stage], &q_map, static_cast<int>(seq.token_begin) * kHeads, 0,
                     full);
          }
          q_at.advance();
          for (int i = 0; i < count; ++i) {
            // A batch of 32 page numbers is read at once, in time for its first page.
            int pages = 0;
            if (i % 32 == 0 && i + lane < count) pages = seq.pages[first + i + lane];
            for (const int stop = min(count, i + 32); i < stop; ++i) {
              const int page = __shfl_sync(0xFFFFFFFFu, pages, i % 32);
              if (lane == 0) {
                uint64_t* full = &shared.full[at.stage];
                barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
                barrier_arrive_expect(full, kTileBytes + kScaleBytes);
                copy_box(shared.keys[at.stage], &key_map, 0, page, full);
                copy_bytes(shared.scales[at.stage],
                           args.key_base + page * args.page_bytes + kTileBytes, kScaleBytes, full);
              }
              at.advance();
            }
            --i;
          }
        });
    return;
  }

  const int group = warp / 4, c = lane % 4, row = warp % 4 * 16 + lane / 4;
  RingPosition<kStages> at;
  RingPosition<2> q_at;
  int turn = 0;  // pages go to the warpgroups in turn
  for_each_part(
      args, shared.pages_before, begin, end, [&](const SeqSpan& seq, int first, int count) {
        const int64_t token_begin = seq.token_begin, first_position = seq.first_position;
        const int num_queries = static_cast<int>(seq.num_tokens);
        float weights[kColumns / 4];
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          const int column = i / 2 * 8 + 2 * c + i % 2;
          // Halved, see HeadSums.
          weights[i] = column / kHeads < num_queries
                           ? 0.5f * args.weights[token_begin * kHeads + column]
                           : 0.0f;
        }
        barrier_wait(&shared.q_full[q_at.stage], q_at.parity);
        const uint64_t b = panel_k_major(shared.q[q_at.stage]);
        for (int i = 0; i < count; ++i, turn ^= 1, at.advance()) {
          if (turn != group) continue;
          barrier_wait(&shared.full[at.stage], at.parity);
          const float scales[2] = {shared.scales[at.stage][row], shared.scales[at.stage][row + 8]};
          const uint64_t a = panel_k_major(shared.keys[at.stage]);
          float products[kColumns / 2];
          mma_begin();
#pragma unroll
          for (int step = 0; step < kIndexDim / 32; ++step) {
            mma_e4m3(products, a + step * kNextUnits, b + step * kNextUnits, step > 0);
          }
          mma_commit();
          mma_wait<0>();
          mma_landed(products);
          barrier_arrive(&shared.empty[at.stage]);
          float own[Sums::kOwn];
          Sums::run(products, weights, c, own);
#pragma unroll
          for (int j = 0; j < Sums::kOwn; ++j) {
            const int sum_row = Sums::row(c, j), query = Sums::query(c, j);
            const int64_t position = int64_t{first + i} * kPageTokens + row + 8 * sum_row;
            if (Sums::writes(c) && query < num_queries && position <= first_position + query) {
              params.scores[(token_begin + query) * params.scores_stride + position] =
                  own[j] * (sum_row == 0 ? scales[0] : scales[1]);
            }
          }
        }
        barrier_arrive(&shared.q_empty[q_at.stage]);
        q_at.advance();
      });
}

template <int kHeads, int kQueries>
cudaError_t start_scores(const ScoreParams& params, int num_multiprocessors, cudaStream_t stream) {
  const IndexScoreArgs& args = params.args;
  constexpr int kColumns = kHeads * kQueries;
  CUtensorMap q_map, key_map;
  cudaError_t status =
      map_rows_of_128_bytes(&q_map, args.q8, int64_t{args.num_tokens} * kHeads, 1,
                            int64_t{args.num_tokens} * kHeads * kIndexDim, kColumns);
  if (status != cudaSuccess) return status;
  status = map_rows_of_128_bytes(&key_map, args.key_base, kPageTokens, args.num_pool_pages,
                                 args.page_bytes, kPageTokens);
  if (status != cudaSuccess) return status;
  const auto kernel = score_pages<kHeads, kQueries>;
  const int num_bytes = sizeof(ScoreShared<kColumns>) + 1024;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
  if (status != cudaSuccess) return status;
  // Two blocks fit a multiprocessor, so one's start and end are covered by the other.
  return start_kernel(kernel, dim3(static_cast<unsigned>(2 * num_multiprocessors)),
                      dim3(kScoreThreads), static_cast<size_t>(num_bytes), stream, true, params,
                      q_map, key_map);
}

// --- selection ---

namespace cg = cooperative_groups;

constexpr int kCluster = 8;
constexpr int kSelectThreads = 1024, kSelectWarps = kSelectThreads / 32;
constexpr int kBins = 2 * kSelectThreads;
constexpr int kMaxKept = 48 * 1024;  // ranks that a block keeps in shared memory

struct SelectShared {
  int bins[2][kBins];
  int warp_sums[kSelectWarps];
  int found_bin, found_above, found_count;
  int warp_above[kSelectWarps], warp_ties[kSelectWarps];
  int above, ties;  // of this block
};

struct SelectParams {
  const float* scores;
  int64_t scores_stride;
  const SeqSpan* seqs;
  int num_seqs;
  int k;
  int num_kept;  // capacity of the ranks in shared memory
  int32_t* positions;
  int32_t* counts;
};

__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kSelectThreads)
    select_kernel(const SelectParams params) {
  wait_for_previous();
  __shared__ SelectShared shared;
  extern __shared__ uint32_t kept[];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank_in_cluster = static_cast<int>(cluster.block_rank());
  const int64_t token = blockIdx.x / kCluster;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const SeqSpan seq = params.seqs[sequence_of(params.seqs, params.num_seqs, token)];
  const int visible = static_cast<int>(seq.first_position + token - seq.token_begin + 1);
  const int k = params.k;
  int32_t* out = params.positions + token * k;
  if (rank_in_cluster == 0 && thread == 0) params.counts[token] = min(k, visible);
  if (visible <= k) {
    for (int i = rank_in_cluster * kSelectThreads + thread; i < k; i += kCluster * kSelectThreads)
      out[i] = i < visible ? i : -1;
    return;
  }

  const int slice = (visible + kCluster - 1) / kCluster;
  const int begin = min(rank_in_cluster * slice, visible), count = min(slice, visible - begin);
  const float* scores = params.scores + token * params.scores_stride + begin;
  const bool in_shared = slice <= params.num_kept;
  if (in_shared) {
    for (int i = thread; i < count; i += kSelectThreads) kept[i] = rank_of_score(scores[i]);
  }
  const auto rank_at = [&](int i) { return in_shared ? kept[i] : rank_of_score(scores[i]); };
  const int rounded = (count + 31) / 32 * 32;  // so that whole warps take part

  uint32_t bound = 0;   // the leading bits of the k-th rank, as far as they are known
  uint32_t known = 0;   // which bits those are
  int wanted = k;       // of the ranks that begin like `bound`
  bool parted = false;  // exactly the ranks >= bound are wanted
  constexpr int kShifts[3] = {21, 10, 0};
  constexpr int kWidths[3] = {11, 11, 10};
#pragma unroll
  for (int round = 0; round < 3; ++round) {
    if (parted) break;
    int* bins = shared.bins[round % 2];
    for (int i = thread; i < kBins; i += kSelectThreads) bins[i] = 0;
    __syncthreads();
    for (int i = thread; i < rounded; i += kSelectThreads) {
      const uint32_t rank = i < count ? rank_at(i) : 0;
      const bool counts = i < count && (rank & known) == bound;
      const int bin = static_cast<int>(rank >> kShifts[round] & ((1u << kWidths[round]) - 1));
      const unsigned who = __ballot_sync(0xFFFFFFFFu, counts);
      if (who == 0) continue;
      // Scores crowd in few bins: those that share the first lane's are added as one.
      const int leader = __ffs(who) - 1;
      const int leading_bin = __shfl_sync(0xFFFFFFFFu, bin, leader);
      const bool same = counts && bin == leading_bin;
      const unsigned together = __ballot_sync(0xFFFFFFFFu, same);
      if (lane == leader) {
        atomicAdd(&bins[bin], __popc(together));
      } else if (counts && !same) {
        atomicAdd(&bins[bin], 1);
      }
    }
    cluster.sync();
    int2 sums = {0, 0};
    for (int block = 0; block < kCluster; ++block) {
      const int2 part = reinterpret_cast<const int2*>(cluster.map_shared_rank(bins, block))[thread];
      sums.x += part.x;
      sums.y += part.y;
    }
    // Of the bins above this thread's.
    int inclusive = sums.x + sums.y;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_down_sync(0xFFFFFFFFu, inclusive, step);
      if (lane + step < 32) inclusive += other;
    }
    if (lane == 0) shared.warp_sums[warp] = inclusive;
    __syncthreads();
    int above = inclusive - sums.x - sums.y;
    for (int other = warp + 1; other < kSelectWarps; ++other) above += shared.warp_sums[other];
    if (above < wanted && above + sums.y >= wanted) {
      shared.found_bin = 2 * thread + 1;
      shared.found_above = above;
      shared.found_count = sums.y;
    } else if (above + sums.y < wanted && above + sums.y + sums.x >= wanted) {
      shared.found_bin = 2 * thread;
      shared.found_above = above + sums.y;
      shared.found_count = sums.x;
    }
    __syncthreads();
    bound |= static_cast<uint32_t>(shared.found_bin) << kShifts[round];
    known |= ((1u << kWidths[round]) - 1) << kShifts[round];
    wanted -= shared.found_above;
    parted = wanted == shared.found_count;
  }

  // Wanted are ranks >= lowest, and of those equal to `bound` the first `num_ties`.
  const uint32_t lowest = parted ? bound : bound + 1;
  const int num_ties = parted ? 0 : wanted;
  const auto is_tie = [&](uint32_t rank) { return !parted && rank == bound; };
  // A warp has a run of ranks, which it reads 32 at a time.
  const int run = (rounded / 32 + kSelectWarps - 1) / kSelectWarps * 32;
  const int run_begin = min(warp * run, rounded), run_end = min(run_begin + run, rounded);
  int num_above = 0, num_equal = 0;
  for (int i = run_begin + lane; i < run_end; i += 32) {
    const uint32_t rank = i < count ? rank_at(i) : 0;
    num_above += i < count && rank >= lowest;
    num_equal += i < count && is_tie(rank);
  }
  num_above = __reduce_add_sync(0xFFFFFFFFu, num_above);
  num_equal = __reduce_add_sync(0xFFFFFFFFu, num_equal);
  if (lane == 0) {
    shared.warp_above[warp] = num_above;
    shared.warp_ties[warp] = num_equal;
  }
  __syncthreads();
  if (warp == 0) {
    const int block_above = __reduce_add_sync(0xFFFFFFFFu, shared.warp_above[lane]);
    const int block_ties = __reduce_add_sync(0xFFFFFFFFu, shared.warp_ties[lane]);
    if (lane == 0) {
      shared.above = block_above;
      shared.ties = block_ties;
    }
  }
  cluster.sync();
  int above_before = 0, ties_before = 0;
  for (int block = 0; block < rank_in_cluster; ++block) {
    above_before += *cluster.map_shared_rank(&shared.above, block);
    ties_before += *cluster.map_shared_rank(&shared.ties, block);
  }
  for (int other = 0; other < warp; ++other) {
    above_before += shared.warp_above[other];
    ties_before += shared.warp_ties[other];
  }
  const unsigned lanes_below = (1u << lane) - 1;
  for (int i = run_begin + lane; i < run_end; i += 32) {
    const uint32_t rank = i < count ? rank_at(i) : 0;
    const bool above = i < count && rank >= lowest, tie = i < count && is_tie(rank);
    const unsigned who_above = __ballot_sync(0xFFFFFFFFu, above);
    const unsigned who_ties = __ballot_sync(0xFFFFFFFFu, tie);
    const int own_above = above_before + __popc(who_above & lanes_below);
    const int own_ties = ties_before + __popc(who_ties & lanes_below);
    if (above || (tie && own_ties < num_ties)) out[own_above + min(own_ties, num_ties)] = begin + i;
    above_before += __popc(who_above);
    ties_before += __popc(who_ties);
  }
  cluster.sync();  // others may still read this block's shared memory
}

}  // namespace

cudaError_t index_scores_decode(const IndexScoreArgs& args, int max_queries, float* scores,
                                int64_t scores_stride, int num_multiprocessors,
                                cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;
  if (args.num_seqs > kMaxSeqs) return cudaErrorInvalidValue;
  const ScoreParams params = {args, scores, scores_stride};
  const int queries = max_queries > 2 ? 4 : max_queries;
  switch (args.num_heads * 8 + queries) {
    case 16 * 8 + 1:
      return start_scores<16, 1>(params, num_multiprocessors, stream);
    case 16 * 8 + 2:
      return start_scores<16, 2>(params, num_multiprocessors, stream);
    case 16 * 8 + 4:
      return start_scores<16, 4>(params, num_multiprocessors, stream);
    case 32 * 8 + 1:
      return start_scores<32, 1>(params, num_multiprocessors, stream);
    case 32 * 8 + 2:
      return start_scores<32, 2>(params, num_multiprocessors, stream);
    case 32 * 8 + 4:
      return start_scores<32, 4>(params, num_multiprocessors, stream);
    case 64 * 8 + 1:
      return start_scores<64, 1>(params, num_multiprocessors, stream);
    case 64 * 8 + 2:
      return start_scores<64, 2>(params, num_multiprocessors, stream);
    case 128 * 8 + 1:
      return start_scores<128, 1>(params, num_multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t select_rows(const float* scores, int64_t scores_stride, const SeqSpan* seqs,
                        int num_seqs, int num_tokens, int k, int64_t max_context,
                        int32_t* positions, int32_t* counts, cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  const int64_t slice = (max_context + kCluster - 1) / kCluster;
  // Longer rows are read again from global memory in every round.
  const int num_kept = slice <= kMaxKept ? static_cast<int>(slice) : 0;
  const cudaError_t status = cudaFuncSetAttribute(
      select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_kept * 4);
  if (status != cudaSuccess) return status;
  const SelectParams params = {scores, scores_stride, seqs,      num_seqs,
                               k,      num_kept,      positions, counts};
  return start_kernel(select_kernel, dim3(static_cast<unsigned>(num_tokens * kCluster)),
                      dim3(kSelectThreads), static_cast<size_t>(num_kept * 4), stream, true,
                      params);
}

}  // namespace indexcache::sm90
