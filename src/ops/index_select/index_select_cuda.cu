// index_select for any GPU, in two kernels over some queries at a time: scores as 32-bit numbers in
// the order of the scores, into a workspace that does not grow with the batch, and an exact radix
// selection from them.
//
// Per visible pair: 2 H D flops, 4 bytes written and, from the L2 cache as long as the workspace
// fits in it, 16 read. bf16 keys with a head_dim of 32, 64 or 128 are scored by tensor cores (mma),
// everything else by f32 or integer arithmetic.
#include <algorithm>

#include "base/checked.h"
#include "ops/index_select/index_select_cuda.h"
#include "ops/kit/mma.cuh"

namespace indexcache {

namespace {

// Larger numbers for larger scores; -0 is 0, and NaN is -infinity.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const float clean = score == score ? score + 0.0f : minus_infinity();
  const uint32_t bits = __float_as_uint(clean);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// NaN passes.
__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0.0f : x; }

struct Scoring {
  const float* q;        // [num_tokens, heads, dim]
  const float* weights;  // [num_tokens, heads]
  const uint8_t* q8;     // the same quantised, and weights times their scales: int8, e4m3 keys
  const float* weights8;
  int64_t heads, dim, k;
  PagedRows keys;
  const SeqSpan* seqs;
  int num_seqs;
  int64_t first_token, num_tokens;  // those of this launch
  uint32_t* ranks;                  // [num_tokens of the launch, row_stride]
  int64_t row_stride;
};

// --- int8 and e4m3 queries: one block quantises one head's row of q ---

constexpr unsigned kQuantiseThreads = 128;

__global__ void __launch_bounds__(kQuantiseThreads)
    quantise_queries(const float* q, const float* weights, int64_t dim, bool fp8, uint8_t* q8,
                     float* weights8) {
  wait_for_previous();
  const float* row = q + blockIdx.x * dim;
  const float scale = block_row_scale(row, dim, fp8 ? 448 : 127);
  for (int64_t d = threadIdx.x; d < dim; d += kQuantiseThreads) {
    q8[blockIdx.x * dim + d] =
        fp8 ? quantised_fp8(row[d], scale) : static_cast<uint8_t>(quantised(row[d], scale));
  }
  if (threadIdx.x == 0) weights8[blockIdx.x] = weights[blockIdx.x] * scale;
}

// --- any keys: a thread scores one key for some queries ---
//
// A block has kKeys keys and kQueries consecutive queries, one after the other. Keys and queries
// pass through shared memory in pieces of kDepth elements; kHeads heads are summed at once.

constexpr int kKeys = 128, kQueries = 8, kDepth = 64, kHeads = 8;

template <DType dtype>
struct Arithmetic {
  using Element = float;
  using Sum = float;
};
template <>
struct Arithmetic<DType::kI8> {
  using Element = int;
  using Sum = int;  // exact
};

template <DType dtype>
__global__ void __launch_bounds__(kKeys) score_kernel(Scoring s) {
  wait_for_previous();
  using Element = typename Arithmetic<dtype>::Element;
  using Sum = typename Arithmetic<dtype>::Sum;
  __shared__ Element keys[kDepth][kKeys + 1];
  __shared__ Element query[kHeads][kDepth];
  const int thread = threadIdx.x;
  const int64_t first_key = static_cast<int64_t>(blockIdx.x) * kKeys, key = first_key + thread;
  constexpr bool kScaled = dtype == DType::kI8 || dtype == DType::kF8E4M3;
  const int64_t row_bytes = s.dim * (kScaled ? 1 : dtype == DType::kF32 ? 4 : 2);
  for (int64_t i = 0; i < kQueries; ++i) {
    const int64_t at = static_cast<int64_t>(blockIdx.y) * kQueries + i;  // of the launch
    if (at >= s.num_tokens) break;
    const int64_t token = s.first_token + at;
    const SeqSpan& seq = s.seqs[find_seq(s.seqs, s.num_seqs, token)];
    const int64_t visible = seq.first_position + token - seq.token_begin + 1;
    if (visible <= s.k || first_key >= visible) continue;
    float score = 0;
    for (int64_t first_head = 0; first_head < s.heads; first_head += kHeads) {
      Sum sums[kHeads] = {};
      for (int64_t begin = 0; begin < s.dim; begin += kDepth) {
        __syncthreads();
        for (int j = thread; j < kKeys * kDepth; j += kKeys) {
          const int64_t p = first_key + j / kDepth, d = begin + j % kDepth;
          Element value = 0;
          if (p < visible && d < s.dim) {
            const uint8_t* row = paged_row(s.keys, row_bytes, seq.pages, p);
            if constexpr (dtype == DType::kI8) {
              value = reinterpret_cast<const int8_t*>(row)[d];
            } else {
              value = element_at<dtype>(row, d);
            }
          }
          keys[j % kDepth][j / kDepth] = value;
        }
        for (int j = thread; j < kHeads * kDepth; j += kKeys) {
          const int64_t head = first_head + j / kDepth, d = begin + j % kDepth;
          const int64_t from = (token * s.heads + head) * s.dim + d;
          Element value = 0;
          if (head < s.heads && d < s.dim) {
            if constexpr (dtype == DType::kI8) {
              value = static_cast<int8_t>(s.q8[from]);
            } else if constexpr (dtype == DType::kF8E4M3) {
              value = f8e4m3_bits_to_f32(s.q8[from]);
            } else {
              value = dtype == DType::kBF16 ? rounded_to_bf16(s.q[from]) : s.q[from];
            }
          }
          query[j / kDepth][j % kDepth] = value;
        }
        __syncthreads();
#pragma unroll 4
        for (int d = 0; d < kDepth; ++d) {
          const Element of_key = keys[d][thread];
#pragma unroll
          for (int h = 0; h < kHeads; ++h) sums[h] += query[h][d] * of_key;
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (first_head + h >= s.heads) break;
        const int64_t from = token * s.heads + first_head + h;
        const float weight = kScaled ? s.weights8[from] : s.weights[from];
        score += weight * relu(static_cast<float>(sums[h]));
      }
    }
    if (key >= visible) continue;
    if constexpr (kScaled) score *= *paged_scale(s.keys, seq.pages, key);
    s.ranks[at * s.row_stride + key] = rank_of(score);
  }
}

// --- bf16 keys on tensor cores ---
//
// A warp keeps 32 keys in registers and goes through the queries of the block, whose heads lie in
// shared memory. Keys are the rows of the product and heads its columns, so that a thread has two
// heads of a key and the sum over heads ends within four lanes.
//
// A lane loads 8 consecutive elements of a row at once, which are two steps of mma: the elements
// that mma takes for 2c, 2c+1, 2c+8, 2c+9 of a step are those at 8c + 4 step .. + 3 of both
// operands, which changes the order of a sum and nothing else.

constexpr int kMmaThreads = 256, kMmaWarps = kMmaThreads / kWarpLanes, kMmaKeys = 32;

template <int kBlocks>  // of 32 elements: head_dim / 32
__global__ void __launch_bounds__(kMmaThreads) score_mma_kernel(Scoring s) {
  wait_for_previous();
  constexpr int kDim = 32 * kBlocks;
  constexpr int kRow = kDim * 2 + 64;  // bytes: two rows of 64 bytes a quarter warp, apart in banks
  uint8_t* query = dynamic_shared<uint8_t>();  // [heads rounded up to 8][kRow]
  const int heads = static_cast<int>((s.heads + 7) / 8 * 8);
  float* weights = reinterpret_cast<float*>(query + heads * kRow);  // [heads]
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, c = lane % 4;
  const int64_t first_key =
      (static_cast<int64_t>(blockIdx.x) * kMmaWarps + threadIdx.x / kWarpLanes) * kMmaKeys;
  const int64_t block_key = static_cast<int64_t>(blockIdx.x) * kMmaWarps * kMmaKeys;

  uint4 keys[2][2][kBlocks];  // [16 keys][g or g + 8][block]
  int loaded_seq = -1;
  int64_t loaded_end = 0;  // keys below are loaded
  for (int64_t i = 0; i < kQueries; ++i) {
    const int64_t at = static_cast<int64_t>(blockIdx.y) * kQueries + i;
    if (at >= s.num_tokens) break;
    const int64_t token = s.first_token + at;
    const int seq_number = find_seq(s.seqs, s.num_seqs, token);
    const SeqSpan& seq = s.seqs[seq_number];
    const int64_t visible = seq.first_position + token - seq.token_begin + 1;
    if (visible <= s.k || block_key >= visible) continue;

    __syncthreads();
    for (int j = threadIdx.x; j < heads * kDim / 2; j += kMmaThreads) {
      const int head = j / (kDim / 2), pair = j % (kDim / 2);
      uint32_t bits = 0;
      if (head < s.heads) {
        const float* from = s.q + (token * s.heads + head) * kDim + 2 * pair;
        bits = bf16_pair(from[0], from[1]);
      }
      *reinterpret_cast<uint32_t*>(query + head * kRow + 4 * pair) = bits;
    }
    for (int head = threadIdx.x; head < heads; head += kMmaThreads)
      weights[head] = head < s.heads ? s.weights[token * s.heads + head] : 0.0f;
    __syncthreads();

    // Later queries of the block see keys that its first did not.
    if (seq_number != loaded_seq || loaded_end < visible) {
      const int64_t seq_end = seq.first_position + seq.num_tokens;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t key = first_key + tile * 16 + half * 8 + g;
          const uint8_t* row =
              key < seq_end ? paged_row(s.keys, kDim * 2, seq.pages, key) : nullptr;
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            keys[tile][half][b] = row != nullptr
                                      ? *reinterpret_cast<const uint4*>(row + 64 * b + 16 * c)
                                      : make_uint4(0, 0, 0, 0);
          }
        }
      }
      loaded_seq = seq_number;
      loaded_end = seq_end;
    }

    float score[2][2] = {};  // [16 keys][g or g + 8]
    for (int head = 0; head < heads; head += 8) {
      float sums[2][4] = {};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint4 of_query =
            *reinterpret_cast<const uint4*>(query + (head + g) * kRow + 64 * b + 16 * c);
        const uint32_t low[2] = {of_query.x, of_query.y}, high[2] = {of_query.z, of_query.w};
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const uint4 top = keys[tile][0][b], bottom = keys[tile][1][b];
          const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
          const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
          mma_bf16(sums[tile], first, low);
          mma_bf16(sums[tile], second, high);
        }
      }
      const float w0 = weights[head + 2 * c], w1 = weights[head + 2 * c + 1];
      const bool second_head = head + 2 * c + 1 < s.heads;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // A head that is not there has products of 0 times NaN when the key has one.
          if (head + 2 * c < s.heads) score[tile][half] += w0 * relu(sums[tile][2 * half]);
          if (second_head) score[tile][half] += w1 * relu(sums[tile][2 * half + 1]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = score[tile][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int64_t key = first_key + tile * 16 + half * 8 + g;
        if (c == 0 && key < visible) s.ranks[at * s.row_stride + key] = rank_of(sum);
      }
    }
  }
}

// --- selection: one block a query ---

constexpr int kSelectThreads = 512, kSelectItems = 8, kBins = 2048;

struct Selecting {
  const uint32_t* ranks;
  int64_t row_stride, first_token, k;
  const SeqSpan* seqs;
  int num_seqs;
  int32_t* positions;
  int32_t* counts;
};

__global__ void __launch_bounds__(kSelectThreads) select_kernel(Selecting s) {
  wait_for_previous();
  __shared__ uint32_t counts[kBins];
  __shared__ uint32_t found_bin, found_above;
  const int thread = threadIdx.x;
  const int64_t token = s.first_token + blockIdx.x;
  const SeqSpan& seq = s.seqs[find_seq(s.seqs, s.num_seqs, token)];
  const int64_t visible = seq.first_position + token - seq.token_begin + 1;
  int32_t* out = s.positions + token * s.k;
  if (thread == 0) s.counts[token] = static_cast<int32_t>(visible < s.k ? visible : s.k);
  if (visible <= s.k) {
    for (int64_t i = thread; i < s.k; i += kSelectThreads)
      out[i] = i < visible ? static_cast<int32_t>(i) : -1;
    return;
  }

  // The k-th highest rank, 11, 11 and 10 bits at a time from the top. `wanted` of those that agree
  // with `prefix` so far are to be taken.
  const uint32_t* ranks = s.ranks + blockIdx.x * s.row_stride;
  uint32_t prefix = 0, known = 0, wanted = static_cast<uint32_t>(s.k);
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t digits = pass == 2 ? 1023 : 2047;
    for (int i = thread; i < kBins; i += kSelectThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t begin = 0; begin < visible; begin += kSelectThreads) {
      const int64_t i = begin + thread;
      const bool counted = i < visible && (ranks[i] & known) == prefix;
      // Scores crowd into few bins, so lanes of a warp with one bin count it together.
      const unsigned lanes = __ballot_sync(kAllLanes, counted);
      if (counted) {
        const uint32_t bin = ranks[i] >> shift & digits;
        const unsigned same = __match_any_sync(lanes, bin);
        if ((same & ((1u << (thread % kWarpLanes)) - 1)) == 0) {
          atomicAdd(&counts[bin], static_cast<uint32_t>(__popc(same)));
        }
      }
    }
    __syncthreads();
    // Thread t has the bins from the top, 4 t .. 4 t + 3.
    uint32_t own[4], sum = 0;
    for (int j = 0; j < 4; ++j) {
      own[j] = counts[kBins - 1 - (4 * thread + j)];
      sum += own[j];
    }
    uint32_t above = block_scan(sum).before;
    for (int j = 0; j < 4; ++j) {
      if (above < wanted && wanted <= above + own[j]) {
        found_bin = static_cast<uint32_t>(kBins - 1 - (4 * thread + j));
        found_above = above;
      }
      above += own[j];
    }
    __syncthreads();
    prefix |= found_bin << shift;
    known |= digits << shift;
    wanted -= found_above;
    __syncthreads();
  }

  // Everything above, and the first `wanted` that equal it, in order.
  uint32_t above_before = 0, equal_before = 0;
  for (int64_t begin = 0; begin < visible; begin += kSelectThreads * kSelectItems) {
    const int64_t first = begin + thread * kSelectItems;
    uint32_t above = 0, equal = 0;
    for (int j = 0; j < kSelectItems; ++j) {
      if (first + j >= visible) break;
      above += ranks[first + j] > prefix;
      equal += ranks[first + j] == prefix;
    }
    const BlockScan scan = block_scan(above | equal << 16);
    uint32_t my_above = above_before + (scan.before & 0xFFFF),
             my_equal = equal_before + (scan.before >> 16);
    for (int j = 0; j < kSelectItems; ++j) {
      if (first + j >= visible) break;
      const uint32_t rank = ranks[first + j];
      if (rank > prefix || (rank == prefix && my_equal < wanted))
        out[my_above + (my_equal < wanted ? my_equal : wanted)] = static_cast<int32_t>(first + j);
      my_above += rank > prefix;
      my_equal += rank == prefix;
    }
    above_before += scan.total & 0xFFFF;
    equal_before += scan.total >> 16;
  }
}

template <int kBlocks>
void score_mma(CudaStream& stream, const Scoring& s, int64_t longest) {
  const int64_t heads = round_up(s.heads, 8);
  launch(score_mma_kernel<kBlocks>,
         dim3(blocks_for(longest, kMmaWarps * kMmaKeys).x, blocks_for(s.num_tokens, kQueries).x),
         kMmaThreads, static_cast<size_t>(heads * (kBlocks * 64 + 64 + 4)), stream, s);
}

void score(CudaStream& stream, const Scoring& s, int64_t longest) {
  const bool aligned = s.keys.page_bytes % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(s.keys.base) % 16 == 0 && s.heads <= 128;
  if (s.keys.dtype == DType::kBF16 && aligned && s.dim == 128)
    return score_mma<4>(stream, s, longest);
  if (s.keys.dtype == DType::kBF16 && aligned && s.dim == 64)
    return score_mma<2>(stream, s, longest);
  if (s.keys.dtype == DType::kBF16 && aligned && s.dim == 32)
    return score_mma<1>(stream, s, longest);
  const auto kernel = s.keys.dtype == DType::kF32    ? score_kernel<DType::kF32>
                      : s.keys.dtype == DType::kBF16 ? score_kernel<DType::kBF16>
                      : s.keys.dtype == DType::kI8   ? score_kernel<DType::kI8>
                                                     : score_kernel<DType::kF8E4M3>;
  launch(kernel, dim3(blocks_for(longest, kKeys).x, blocks_for(s.num_tokens, kQueries).x), kKeys, 0,
         stream, s);
}

}  // namespace

void index_select_cuda(Exec& exec, const IndexSelectArgs& args) {
  const int64_t heads = args.num_heads, dim = args.head_dim;
  int64_t num_tokens = 0, longest = 0;
  for (const SeqSpan& seq : args.seqs) {
    num_tokens += seq.num_tokens;
    if (seq.num_tokens > 0) longest = std::max(longest, seq.first_position + seq.num_tokens);
  }
  if (num_tokens == 0) return;
  // A step of decoding may be recorded in a graph: nothing in it may depend on the contexts.
  if (num_tokens == static_cast<int64_t>(args.seqs.size()))
    longest = std::max(longest, args.max_context);
  CudaStream& stream = exec.cuda();
  const bool scaled = rows_have_scales(args.keys.dtype), scored = longest > args.k;
  const int64_t row_stride = scored ? round_up(longest, 4) : 0;
  const int64_t rows =
      scored ? std::clamp<int64_t>(kIndexSelectWorkspaceBytes / (4 * row_stride), 1, num_tokens)
             : num_tokens;
  const int64_t rank_bytes = round_up(rows * row_stride * 4, 256),
                weight_bytes = scaled ? round_up(num_tokens * heads * 4, 256) : 0,
                query_bytes = scaled ? num_tokens * heads * dim : 0;
  uint8_t* scratch = stream.scratch(static_cast<size_t>(rank_bytes + weight_bytes + query_bytes));

  Scoring s = {};
  s.q = args.q;
  s.weights = args.weights;
  s.heads = heads;
  s.dim = dim;
  s.k = args.k;
  s.keys = args.keys;
  s.seqs = args.device_seqs;
  s.num_seqs = static_cast<int>(args.seqs.size());
  s.ranks = reinterpret_cast<uint32_t*>(scratch);
  s.row_stride = row_stride;
  if (scaled && scored) {
    float* weights8 = reinterpret_cast<float*>(scratch + rank_bytes);
    uint8_t* q8 = scratch + rank_bytes + weight_bytes;
    launch(quantise_queries, blocks_for(num_tokens * heads, 1), kQuantiseThreads, 0, stream, args.q,
           args.weights, dim, args.keys.dtype == DType::kF8E4M3, q8, weights8);
    s.q8 = q8;
    s.weights8 = weights8;
  }
  for (int64_t first = 0; first < num_tokens; first += rows) {
    s.first_token = first;
    s.num_tokens = std::min(rows, num_tokens - first);
    if (scored) score(stream, s, longest);
    launch(select_kernel, blocks_for(s.num_tokens, 1), kSelectThreads, 0, stream,
           Selecting{s.ranks, row_stride, first, args.k, s.seqs, s.num_seqs, args.positions,
                     args.counts});
  }
}

}  // namespace indexcache
