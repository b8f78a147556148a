// Attention over the selected tokens only, in the absorbed form of MLA: every head shares one
// latent row per token.
//
//   a[t, h, s] = scale * <q[t, h, :], row[s, :]>                              s in selection(t)
//   out[t, h, :] = sum_s softmax_s(a[t, h, s]) * row[s, 0:value_dim]
//
// q is [W_UK^T q_nope, rope(q_pe)] and a row is [normalised latent, rope(k_pe)] (DeepSeek-V2
// section 2.1.2; the output still has to go through W_UV). row_elements = value_dim +
// qk_rope_head_dim.
//
// Rules. Only the first counts[t] positions of a row of `positions` are read; they are ascending
// and in [0, position(t)]. Count 0 writes zeros. NaN and infinity in a selected row or in q become
// NaN in the outputs of that token that they reach, and in no other token.
//
// Sizes. 1 to 128 heads; value_dim and row_elements even, row_elements >= value_dim.
//
// Types. q and out f32; rows f32, bf16, or fp8 with value_dim fp8_elements (ops/kit/paged.h), whose
// elements are e4m3 times scale in f32. With bf16 rows, q and the softmax weights may be rounded to
// bf16 before their products, and bf16 numbers below 2^-126 taken for 0; with fp8 rows so may these
// and the elements, unless f32_products is set; sums and the softmax itself are f32. fp8 rows are
// made for GPUs: the CPU has ref alone for them.
//
// Tolerance against ref (double), to first order. With u = 2^-24, r = 2^-9 for bf16 rows, 2^-8 for
// fp8 rows and 0 for f32 rows or with f32_products, A = max_s |scale| sum_i |q_i row_si| of the
// head, and R = max_s |row_sd|:
//
//   |out_d - ref_d| <= R (min(D, 2) + r + (3 count + 32) u),   D = (r + (row_elements + 4) u) A.
//
// D bounds the error of a score: q, and elements of fp8 rows, rounded once, row_elements products
// summed, scaled, and the maximum (at most A as well) subtracted. Softmax of scores off by at most
// D differs by at most 2 tanh(D / 2) <= min(D, 2) in the sum of absolute differences, so an output
// by that times R. The weights, which sum to 1, are rounded to bf16 once, as are elements of fp8
// rows: r. The rest is f32: exp and its rescaling between blocks (2^-22 each), the sum of the
// weights, the weighted sum, the division.
//
// Determinism. The same arguments give the same bits with any number of threads. How a token's
// selection is split depends on the number of tokens in the call, so a batch equals its tokens one
// by one within twice the tolerance. With Exec::batch_invariant nothing is split, and a batch
// equals its tokens bit for bit; a few tokens then keep only as many threads busy.
//
// Cost. 2 H (row_elements + value_dim) flops and one row for each selected (query, token) pair.
#pragma once

#include <span>

#include "ops/kit/exec.h"
#include "ops/kit/paged.h"

namespace indexcache {

struct SparseMlaArgs {
  const float* q = nullptr;  // [num_tokens, num_heads, row_elements]
  int64_t num_heads = 0;
  int64_t value_dim = 0;  // kv_lora_rank
  float scale = 0;
  PagedRows rows;                      // latent KV of the layer
  std::span<const SeqSpan> seqs;       // cover rows [0, num_tokens) of q in order
  const int32_t* positions = nullptr;  // [num_tokens, k] ascending
  const int32_t* counts = nullptr;     // [num_tokens]
  int64_t k = 0;
  float* out = nullptr;                  // [num_tokens, num_heads, value_dim]
  const SeqSpan* device_seqs = nullptr;  // on a GPU: `seqs` in its memory
  bool f32_products = false;             // round nothing that fp8 rows meet
};

void sparse_mla(Exec& exec, const SparseMlaArgs& args);
Cost sparse_mla_cost(Device device, const SparseMlaArgs& args);

}  // namespace indexcache
