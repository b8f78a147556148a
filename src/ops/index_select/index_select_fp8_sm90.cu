// One call for a batch: f32 queries become e4m3, then the way for few queries a sequence or the one
// for many.
#include <algorithm>

#include "ops/index_select/index_select_sm90.cuh"

namespace indexcache::sm90 {
namespace {

int64_t padded_bytes(int64_t num_bytes) { return (num_bytes + 255) / 256 * 256; }

struct Sizes {
  int num_tokens = 0, num_heads = 0, max_queries = 0, num_blocks = 0;
  bool decode = false;
  int64_t q8 = 0, weights = 0, rest = 0;  // bytes of the parts of the workspace
};

Sizes sizes_of(const IndexSelectFp8Args& args, int num_multiprocessors) {
  Sizes sizes;
  sizes.num_heads = padded_index_heads(args.num_heads);
  const int block_queries = 256 / sizes.num_heads;
  for (const SeqSpan& seq : args.seqs) {
    const int tokens = static_cast<int>(seq.num_tokens);
    sizes.num_tokens += tokens;
    sizes.max_queries = std::max(sizes.max_queries, tokens);
    sizes.num_blocks += (tokens + block_queries - 1) / block_queries;
  }
  const int columns = sizes.num_heads * (sizes.max_queries > 2 ? 4 : sizes.max_queries);
  const int64_t score_bytes = int64_t{sizes.num_tokens} * args.max_context * 4;
  sizes.decode = sizes.max_queries <= 4 && columns <= 128 && args.seqs.size() <= 256 &&
                 score_bytes <= kMaxDecodeScoreBytes;
  sizes.q8 = padded_bytes(int64_t{sizes.num_tokens} * sizes.num_heads * kIndexDim);
  sizes.weights = padded_bytes(int64_t{sizes.num_tokens} * sizes.num_heads * 4);
  sizes.rest = sizes.decode ? score_bytes
                            : index_select_prefill_workspace(sizes.num_heads, num_multiprocessors);
  return sizes;
}

}  // namespace

int64_t index_select_fp8_workspace(const IndexSelectFp8Args& args, int num_multiprocessors) {
  const Sizes sizes = sizes_of(args, num_multiprocessors);
  return sizes.q8 + sizes.weights + sizes.rest;
}

cudaError_t index_select_fp8(const IndexSelectFp8Args& args, void* workspace,
                             int num_multiprocessors, cudaStream_t stream) {
  const Sizes sizes = sizes_of(args, num_multiprocessors);
  if (sizes.num_tokens == 0) return cudaSuccess;
  uint8_t* q8 = static_cast<uint8_t*>(workspace);
  float* weights = reinterpret_cast<float*>(q8 + sizes.q8);
  void* rest = q8 + sizes.q8 + sizes.weights;
  cudaError_t status = quantise_queries(args.q, args.weights, sizes.num_tokens, args.num_heads,
                                        sizes.num_heads, q8, weights, stream);
  if (status != cudaSuccess) return status;
  IndexScoreArgs scored;
  scored.q8 = q8;
  scored.weights = weights;
  scored.num_heads = sizes.num_heads;
  scored.num_tokens = sizes.num_tokens;
  scored.key_base = args.key_base;
  scored.page_bytes = args.page_bytes;
  scored.num_pool_pages = args.num_pool_pages;
  scored.seqs = args.device_seqs;
  scored.num_seqs = static_cast<int>(args.seqs.size());
  scored.k = args.k;
  scored.positions = args.positions;
  scored.counts = args.counts;
  if (!sizes.decode) {
    return index_select_prefill(scored, sizes.num_blocks, args.lower_bounds, nullptr, 0, rest,
                                num_multiprocessors, stream);
  }
  float* scores = static_cast<float*>(rest);
  status = index_scores_decode(scored, sizes.max_queries, scores, args.max_context,
                               num_multiprocessors, stream);
  if (status != cudaSuccess) return status;
  return select_rows(scores, args.max_context, args.device_seqs, scored.num_seqs, sizes.num_tokens,
                     args.k, args.max_context, args.positions, args.counts, stream);
}

}  // namespace indexcache::sm90
