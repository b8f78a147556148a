// The lightning indexer: score every visible past token and keep the k best, without storing the
// scores.
//
//   score(t, s) = sum_h weights[t, h] * relu(<q[t, h], key[s]>)        for s <= position(t)
//   selection(t) = the min(k, position(t) + 1) positions with the highest scores
//
// (arXiv 2512.02556 section 2.1; the factors num_heads^-1/2 * head_dim^-1/2 are already in
// `weights`.)
//
// Rules. A query never scores a position after its own. Ties go to the lower position. NaN ranks as
// -infinity, and -infinity is still selected when fewer than k visible tokens rank above it. A
// query that sees no more than k tokens selects them all and scores nothing. Output rows are
// ascending positions; the rest of the row, up to k, is -1.
//
// Types. q and weights are f32; keys f32, bf16, int8 or e4m3. With bf16 keys, q is rounded to bf16
// before the product (the field's habit, and what the bf16 dot-product instruction takes; that
// instruction also counts denormals as zero). Dot products and sums over heads are accumulated in
// f32.
//
// With int8 keys (ops/kit/int8_rows.h) each row of q becomes int8 in the same way, with a scale:
//   score(t, s) = key_scale[s] * sum_h (weights[t, h] * q_scale[t, h]) * relu(<q8[t, h], key8[s]>)
// Dot products are exact integers, the rest is f32: the brackets and the outer product round once.
// A row of q, or a key, with NaN or infinity makes its scores NaN.
//
// With e4m3 keys (ops/kit/fp8_rows.h) the same formula holds with rows of e4m3. Products of two
// e4m3 numbers are exact in f32.
//
// Sameness. Within one implementation a query's scores do not depend on its neighbours in the
// batch, and the best k are exact by (score, position). So one prefill, a chunked one, decoding one
// by one, and any number of threads give the same bits.
//
// Tolerance. Implementations may add in another order, so a score may differ by
//   2 (D + H) eps * sum_h |w_h| * sum_d |q_hd k_d|,  eps = 2^-24
// (with int8 and e4m3 keys of the rows as quantised). Hopper's tensor cores (`sm90_fp8`) keep of
// the terms of one instruction, 32 products and the sum so far, 13 bits below the largest, M, and
// cut off the rest: a dot product may differ by (D / 32) * 33 * 2^-13 * M besides. Selections must
// be equal except for positions whose score is within twice that of the k-th best.
//
// Memory: O(threads * (k + tile) * queries in a block), independent of the context.
// Cost: 2 H D flops for each visible (query, key) pair; every key is read once for each block of
// queries.
#pragma once

#include <span>

#include "ops/kit/exec.h"
#include "ops/kit/paged.h"

namespace indexcache {

struct IndexSelectArgs {
  const float* q = nullptr;        // [num_tokens, num_heads, head_dim], rope applied
  const float* weights = nullptr;  // [num_tokens, num_heads]
  int64_t num_heads = 0;
  int64_t head_dim = 0;  // even
  PagedRows keys;        // rows of head_dim; the rows of the queries themselves are already written
  std::span<const SeqSpan> seqs;         // cover rows [0, num_tokens) of q in order
  int64_t k = 0;                         // index_topk >= 1
  int32_t* positions = nullptr;          // out [num_tokens, k]
  int32_t* counts = nullptr;             // out [num_tokens]: min(k, position + 1)
  const SeqSpan* device_seqs = nullptr;  // on a GPU: `seqs` in its memory
  // At least the positions of any sequence, of this call and, when it is captured in a graph, of
  // every replay with other sequences in device_seqs; 0: the longest of `seqs`. Changes no result.
  int64_t max_context = 0;
};

// Up to here sums of int8 products fit 32 bits. A config cannot ask for more.
inline constexpr int64_t kMaxInt8HeadDim = 1 << 17;

void index_select(Exec& exec, const IndexSelectArgs& args);
Cost index_select_cost(const IndexSelectArgs& args);

// Best first, `ref` last.
std::span<const OpImpl<IndexSelectArgs>> index_select_impls();

// The meaning of the op: obvious loops, sums in double.
void index_select_ref(Exec& exec, const IndexSelectArgs& args);

}  // namespace indexcache
