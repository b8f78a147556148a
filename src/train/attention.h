// Attention of the trainer, dense and over a selection, and the distributions that indexers learn.
//
// Shapes: T tokens, H heads, k selected. A selection is i32 [T, k]: places in the batch (not in the
// document), -1 where fewer than k are visible.
#pragma once

#include "train/batch.h"

namespace indexcache {

// Causal attention within documents. q and k [T, H, D], v [T, H, V]; returns [T, H, V].
torch::Tensor dense_attention(const torch::Tensor& q, const torch::Tensor& k,
                              const torch::Tensor& v, double scale, const Batch& batch);

// What the indexer learns from dense attention: the softmax of the chunk's queries averaged over
// heads, f32 [queries, keys]; hidden pairs are 0. No gradient.
torch::Tensor mean_probabilities(const torch::Tensor& q, const torch::Tensor& k, double scale,
                                 const Batch& batch, const Chunk& chunk);

// Absorbed MLA over the selected rows: q [T, H, D], rows [T, D] of which the first `value_dim` are
// the value. Returns the output [T, H, value_dim] and the softmax averaged over heads, f32 [T, k]
// (no gradient; 0 where nothing is selected).
//
// Rows are gathered chunk by chunk, forward and backward, so memory is O(T), not O(T k D). Cost per
// token: about 10 passes over k D elements. Masked dense attention would be quadratic: at 16384
// tokens and k = 128 it does 64 times the products.
struct SparseAttention {
  torch::Tensor output;
  torch::Tensor probabilities;
};
SparseAttention sparse_attention(const torch::Tensor& q, const torch::Tensor& rows,
                                 const torch::Tensor& selection, int64_t value_dim, double scale);

}  // namespace indexcache
