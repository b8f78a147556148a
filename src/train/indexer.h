// The lightning indexer in training: its scores, the selection it makes, and what it learns from.
//
//   I(t, s) = sum_h w(t, h) relu(<q(t, h), k(s)>),  w = weights_proj(x) Hi^-1/2 D^-1/2
//   q(t) = softmax of I(t, .) over the visible tokens (warm-up) or the selected ones (sparse)
//
// Loss of one full layer l that serves layers l .. l+m (paper section 3.2, L_multi), per token:
//
//   1/(m+1) sum_j KL(p^(l+j) || q^(l)) = sum_s pbar (-log q) - 1/(m+1) sum_j H(p^(l+j))
//
// with pbar the mean of the p^(l+j). By Proposition 1 the gradient is that of KL(pbar || q), so one
// backward pass of the indexer serves all the layers of a group; the entropies make the printed
// value the paper's. m = 0 is DeepSeek's per-layer loss.
//
// The indexer's inputs are detached: its loss never reaches the backbone, and its graph ends here.
// So each chunk's loss is differentiated at once and nothing of it is kept.
#pragma once

#include "train/attention.h"

namespace indexcache {

struct IndexerOutput {
  torch::Tensor q;  // [T, Hi, D]
  torch::Tensor k;  // [T, D]
  torch::Tensor w;  // [T, Hi]
};

// Best `topk` visible tokens of each token: i32 [T, topk], -1 padded. No gradient.
torch::Tensor select_tokens(const IndexerOutput& indexer, int64_t topk, const Batch& batch);

// q and k of a layer whose dense attention is a target, detached: [T, H, D] each.
struct DenseTarget {
  torch::Tensor q, k;
};

// Mean over the batch's tokens, nats, f64 on the device. With `weight` > 0 the gradient of weight *
// loss goes to whatever made `indexer`.
torch::Tensor dense_indexer_loss(const IndexerOutput& indexer,
                                 const std::vector<DenseTarget>& targets, double attention_scale,
                                 const Batch& batch, double weight);

// The same over the selection alone; targets are f32 [T, topk] softmax over the selected, averaged
// over heads.
torch::Tensor sparse_indexer_loss(const IndexerOutput& indexer, const torch::Tensor& selection,
                                  const std::vector<torch::Tensor>& targets, double weight);

}  // namespace indexcache
