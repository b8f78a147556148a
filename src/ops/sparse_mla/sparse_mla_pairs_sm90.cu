// Memory bound: two selections are read and one union is written, under 32 KB a pair of tokens.
#include "ops/sparse_mla/sparse_mla_pairs_sm90.h"

namespace indexcache::sm90 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWindow = 5 << 15;  // positions whose bits of both tokens are in shared memory

struct Wanted {
  const SeqSpan* seq;
  const int32_t* positions;
  int count;
};

__device__ Wanted wanted_by(const SparseMlaSm90Args& args, int64_t token) {
  if (token >= args.num_tokens) return {nullptr, nullptr, 0};
  int low = 0, high = args.num_seqs - 1;  // the last run that begins no later than the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (args.seqs[middle].token_begin <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {args.seqs + low, args.positions + token * args.k, args.counts[token]};
}

__device__ __forceinline__ int slot_of(const int32_t* pages, int64_t position) {
  return pages[position / kPageTokens] * static_cast<int>(kPageTokens) +
         static_cast<int>(position % kPageTokens);
}

// One block a pair. The positions of both become bits, which are read back in order.
__global__ void __launch_bounds__(kThreads)
    join_kernel(const SparseMlaSm90Args args, int32_t* slots, int32_t* counts) {
  __shared__ uint32_t bits[2][kWindow / 32];
  __shared__ int warp_counts[kWarps];
  const int64_t pair = blockIdx.x;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Wanted wanted[2] = {wanted_by(args, 2 * pair), wanted_by(args, 2 * pair + 1)};
  int32_t* out = slots + pair * 2 * args.k;
  if (wanted[1].count == 0 || wanted[0].seq != wanted[1].seq) {
    for (int i = thread; i < wanted[0].count; i += kThreads)
      out[i] = slot_of(wanted[0].seq->pages, wanted[0].positions[i]) | 1 << 30;
    for (int i = thread; i < wanted[1].count; i += kThreads) {
      out[wanted[0].count + i] =
          slot_of(wanted[1].seq->pages, wanted[1].positions[i]) | static_cast<int>(1u << 31);
    }
    if (thread == 0) counts[pair] = wanted[0].count + wanted[1].count;
    return;
  }
  const int32_t* pages = wanted[0].seq->pages;
  // Positions are ascending, so the last is the highest.
  int64_t end = wanted[1].positions[wanted[1].count - 1] + int64_t{1};
  if (wanted[0].count > 0) end = max(end, wanted[0].positions[wanted[0].count - 1] + int64_t{1});
  int written = 0;
  for (int64_t begin = 0; begin < end; begin += kWindow) {
    const int words = static_cast<int>((min(end - begin, int64_t{kWindow}) + 31) / 32);
    __syncthreads();
    for (int i = thread; i < words; i += kThreads) bits[0][i] = bits[1][i] = 0;
    __syncthreads();
    for (int token = 0; token < 2; ++token) {
      for (int i = thread; i < wanted[token].count; i += kThreads) {
        const int64_t at = wanted[token].positions[i] - begin;
        if (at >= 0 && at < kWindow) atomicOr(&bits[token][at / 32], 1u << (at % 32));
      }
    }
    __syncthreads();
    // A warp has a run of words, which it reads 32 at a time.
    const int run = (words + kThreads - 1) / kThreads * 32;
    const int run_begin = min(warp * run, words), run_end = min(run_begin + run, words);
    int count = 0;
    for (int i = run_begin + lane; i < run_end; i += 32) count += __popc(bits[0][i] | bits[1][i]);
    count = __reduce_add_sync(0xFFFFFFFFu, count);
    if (lane == 0) warp_counts[warp] = count;
    __syncthreads();
    int to = written;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) to += warp_counts[i];
      written += warp_counts[i];
    }
    for (int i = run_begin; i < run_end; i += 32) {
      const uint32_t first = i + lane < run_end ? bits[0][i + lane] : 0;
      const uint32_t second = i + lane < run_end ? bits[1][i + lane] : 0;
      uint32_t word = first | second;
      const int own = __popc(word);
      int inclusive = own;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
        if (lane >= step) inclusive += other;
      }
      for (int at = to + inclusive - own; word != 0; word &= word - 1, ++at) {
        const int bit = __ffs(word) - 1;
        const uint32_t who = (first >> bit & 1) << 30 | (second >> bit & 1) << 31;
        out[at] = slot_of(pages, begin + (i + lane) * 32 + bit) | static_cast<int>(who);
      }
      to += __shfl_sync(0xFFFFFFFFu, inclusive, 31);
    }
  }
  if (thread == 0) counts[pair] = written;
}

}  // namespace

int64_t sparse_mla_pairs_workspace(int num_tokens, int k) {
  return (num_tokens + 1) / 2 * (2 * int64_t{k} + 1) * 4;
}

cudaError_t join_selections(const SparseMlaSm90Args& args, int32_t* slots, int32_t* counts,
                            cudaStream_t stream) {
  join_kernel<<<(args.num_tokens + 1) / 2, kThreads, 0, stream>>>(args, slots, counts);
  return cudaGetLastError();
}

}  // namespace indexcache::sm90
