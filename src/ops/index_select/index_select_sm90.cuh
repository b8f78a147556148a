// The lightning indexer on Hopper, in fp8: what the files *_sm90.cu of this folder offer to the
// op's table. Plain functions that put kernels on a stream; none waits for the GPU.
//
//   score(t, s) = key_scale[s] * sum_h weights[t, h] * relu(<q8[t, h], k8[s]>)
//
// in e4m3 with f32 sums of the tensor core; `weights` already contain the scale of q8[t, h]. Rules
// of the op (index_select.h) hold: exact best k of these scores, ties to the lower position, NaN as
// -infinity, ascending positions, -1 behind them. Sums over heads are added in one fixed order, so
// that a query's scores do not depend on the batch, and decode gives the bits of prefill.
//
// Keys lie in pages of [64][128] e4m3 and then [64] f32 scales; page_bytes and key_base are
// multiples of 16.
//
// All pointers are of the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "ops/kit/paged.h"

namespace indexcache::sm90 {

inline constexpr int kIndexDim = 128;
inline constexpr int kMaxIndexTopK = 4096;

// The heads that the kernels are compiled for; other counts are padded with heads of weight 0.
// 0 if there are more heads than any kernel takes.
constexpr int padded_index_heads(int64_t num_heads) {
  return num_heads <= 16    ? 16
         : num_heads <= 32  ? 32
         : num_heads <= 64  ? 64
         : num_heads <= 128 ? 128
                            : 0;
}

// --- the whole op (index_select_fp8_sm90.cu) ---

inline constexpr int64_t kMaxDecodeScoreBytes = 256 << 20;

struct IndexSelectFp8Args {
  const float* q = nullptr;        // [num_tokens, num_heads, 128], 16-byte aligned
  const float* weights = nullptr;  // [num_tokens, num_heads]
  int num_heads = 0;               // 1 to 128
  const uint8_t* key_base = nullptr;
  int64_t page_bytes = 0;
  int64_t num_pool_pages = 0;
  std::span<const SeqSpan> seqs;         // on the host; page tables are not used
  const SeqSpan* device_seqs = nullptr;  // the same on the GPU
  int64_t max_context = 0;  // at least the longest sequence; in a graph, of every replay
  int k = 0;                // 1 to kMaxIndexTopK
  const float* lower_bounds = nullptr;  // see index_select_prefill()
  int32_t* positions = nullptr;         // out [num_tokens, k]
  int32_t* counts = nullptr;            // out [num_tokens]
};

// Bytes of `workspace`, which is 256-byte aligned.
int64_t index_select_fp8_workspace(const IndexSelectFp8Args& args, int num_multiprocessors);

// Batches of at most 4 tokens a sequence (as far as their scores take no more than
// kMaxDecodeScoreBytes) may be captured in a graph and replayed with other contents of device_seqs
// of the same numbers of tokens.
cudaError_t index_select_fp8(const IndexSelectFp8Args& args, void* workspace,
                             int num_multiprocessors, cudaStream_t stream);

// --- its parts ---

struct IndexScoreArgs {
  const uint8_t* q8 = nullptr;     // [num_tokens, num_heads, 128] e4m3
  const float* weights = nullptr;  // [num_tokens, num_heads]
  int num_heads = 0;               // 16, 32, 64 or 128
  int num_tokens = 0;
  const uint8_t* key_base = nullptr;
  int64_t page_bytes = 0;
  int64_t num_pool_pages = 0;
  const SeqSpan* seqs = nullptr;  // [num_seqs]
  int num_seqs = 0;
  int k = 0;                     // 1 to kMaxIndexTopK
  int32_t* positions = nullptr;  // out [num_tokens, k]
  int32_t* counts = nullptr;     // out [num_tokens]
};

// --- many queries a sequence (index_select_sm90.cu) ---

// Bytes of `workspace` for index_select_prefill(); independent of the context.
int64_t index_select_prefill_workspace(int num_heads, int num_multiprocessors);

// num_blocks: at least the sum over sequences of ceil(num_tokens / (256 / num_heads)).
// lower_bounds: null, or [num_tokens] scores not above the query's k-th best one, for instance the
// least score that it gives to any k tokens; it saves work and changes no result.
// all_scores: null, or [num_tokens, scores_stride] that receives every visible score (for tests).
cudaError_t index_select_prefill(const IndexScoreArgs& args, int num_blocks,
                                 const float* lower_bounds, float* all_scores,
                                 int64_t scores_stride, void* workspace, int num_multiprocessors,
                                 cudaStream_t stream);

// --- few queries a sequence (index_select_decode_sm90.cu) ---

// Scores of every visible token: scores[t * scores_stride + s]. Each sequence has at most
// `max_queries` (1 to 4) tokens in the batch; num_seqs <= 256. How long they are is read on the
// GPU, so the call can be captured in a graph.
cudaError_t index_scores_decode(const IndexScoreArgs& args, int max_queries, float* scores,
                                int64_t scores_stride, int num_multiprocessors,
                                cudaStream_t stream);

// Best k of each row of scores: a row has as many as its token sees. max_context: at least the
// longest row, it decides only where a row is kept while it is searched.
cudaError_t select_rows(const float* scores, int64_t scores_stride, const SeqSpan* seqs,
                        int num_seqs, int num_tokens, int k, int64_t max_context,
                        int32_t* positions, int32_t* counts, cudaStream_t stream);

// --- small (index_quantise_sm90.cu) ---

// Rows of 128 numbers to e4m3 with scale = max |x| / 448 (a row of zeros: scale 0): x [num_tokens,
// num_heads, 128] becomes q8 [num_tokens, padded_heads, 128], and out_weights[t, h] = weights[t, h]
// * scale. Padding is zeros.
cudaError_t quantise_queries(const float* x, const float* weights, int num_tokens, int num_heads,
                             int padded_heads, uint8_t* q8, float* out_weights,
                             cudaStream_t stream);

// Keys [num_tokens, 128] of the runs `seqs` into their pages, with scales.
cudaError_t store_index_keys(const float* keys, const SeqSpan* seqs, int num_seqs, int num_tokens,
                             uint8_t* key_base, int64_t page_bytes, cudaStream_t stream);

}  // namespace indexcache::sm90
