#include "train/indexer.h"

#include <limits>

namespace indexcache {

namespace {

constexpr double kMasked = -std::numeric_limits<double>::infinity();
constexpr int64_t kTriplesInMemory = int64_t{1} << 29;   // (query, key, head)
constexpr int64_t kGatheredElements = int64_t{1} << 28;  // of gathered keys

// q [C, Hi, D], k [K, D], w [C, Hi] -> [C, K] in `type`, which also decides how the heads are
// summed.
torch::Tensor scores(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& w,
                     torch::ScalarType type) {
  const torch::Tensor dots =
      torch::matmul(q.flatten(0, 1), k.t()).view({q.size(0), q.size(1), k.size(0)});
  return torch::bmm(w.to(type).unsqueeze(1), torch::relu(dots).to(type)).squeeze(1);
}

// Leaves that stand for an IndexerOutput: chunks differentiate into them, and one backward pass at
// the end takes the sums on to the indexer's weights.
struct Leaves {
  const IndexerOutput& source;
  IndexerOutput gradient;

  explicit Leaves(const IndexerOutput& indexer) : source(indexer) {
    gradient.q = torch::zeros_like(indexer.q);
    gradient.k = torch::zeros(indexer.k.sizes(), indexer.k.options().dtype(torch::kFloat));
    gradient.w = torch::zeros_like(indexer.w);
  }

  void backward(double weight) const {
    torch::autograd::backward(
        {source.q, source.k, source.w},
        {gradient.q.mul(weight), gradient.k.mul(weight).to(source.k.scalar_type()),
         gradient.w.mul(weight)});
  }
};

torch::Tensor leaf(const torch::Tensor& tensor) { return tensor.detach().requires_grad_(); }

// sum p log p, with 0 log 0 = 0
torch::Tensor negative_entropy(const torch::Tensor& p) { return torch::xlogy(p, p).sum(); }

// sum of p log q over pairs with p > 0: where p is 0, log q may be -inf.
torch::Tensor expected_log(const torch::Tensor& p, const torch::Tensor& log_q) {
  return p.mul(log_q.masked_fill(p.eq(0), 0)).sum();
}

}  // namespace

torch::Tensor select_tokens(const IndexerOutput& indexer, int64_t topk, const Batch& batch) {
  torch::NoGradGuard no_grad;
  const int64_t T = batch.num_tokens, heads = indexer.q.size(1);
  torch::Tensor selection = torch::full({T, topk}, -1, indexer.q.options().dtype(torch::kInt));
  for (const Chunk& chunk : chunks(batch, kTriplesInMemory / heads)) {
    const int64_t n = chunk.num_queries();
    const torch::Tensor s = scores(indexer.q.narrow(0, chunk.first, n),
                                   indexer.k.narrow(0, chunk.first_key, chunk.num_keys()),
                                   indexer.w.narrow(0, chunk.first, n), indexer.q.scalar_type())
                                .masked_fill_(hidden_pairs(batch, chunk), kMasked);
    const auto [best, places] = s.topk(std::min(topk, chunk.num_keys()), -1, true, false);
    selection.narrow(0, chunk.first, n)
        .narrow(1, 0, places.size(1))
        .copy_(places.add(chunk.first_key).masked_fill_(best.eq(kMasked), -1));
  }
  return selection;
}

torch::Tensor dense_indexer_loss(const IndexerOutput& indexer,
                                 const std::vector<DenseTarget>& targets, double attention_scale,
                                 const Batch& batch, double weight) {
  CHECK(!targets.empty());
  const bool differentiate = weight > 0;
  const auto num_targets = static_cast<double>(targets.size());
  const int64_t heads = std::max(indexer.q.size(1), targets[0].q.size(1));
  const double per_token = 1.0 / static_cast<double>(batch.num_tokens);
  Leaves leaves(indexer);
  torch::Tensor total = torch::zeros({}, indexer.w.options().dtype(torch::kDouble));
  for (const Chunk& chunk : chunks(batch, kTriplesInMemory / heads)) {
    torch::Tensor mean_p;
    for (const DenseTarget& target : targets) {
      const torch::Tensor p = mean_probabilities(target.q, target.k, attention_scale, batch, chunk);
      total.add_(negative_entropy(p), per_token / num_targets);
      mean_p = mean_p.defined() ? mean_p.add_(p) : p;
    }
    mean_p.div_(num_targets);

    const int64_t n = chunk.num_queries();
    torch::AutoGradMode grad_mode(differentiate);
    const torch::Tensor q = leaf(indexer.q.narrow(0, chunk.first, n));
    const torch::Tensor k = leaf(indexer.k.narrow(0, chunk.first_key, chunk.num_keys()));
    const torch::Tensor w = leaf(indexer.w.narrow(0, chunk.first, n));
    const torch::Tensor log_q = scores(q, k, w, torch::kFloat)
                                    .masked_fill(hidden_pairs(batch, chunk), kMasked)
                                    .log_softmax(-1);
    const torch::Tensor loss = expected_log(mean_p, log_q).mul(-per_token);
    total.add_(loss.detach());
    if (!differentiate) continue;
    const auto grads = torch::autograd::grad({loss}, {q, k, w});
    torch::NoGradGuard no_grad;
    leaves.gradient.q.narrow(0, chunk.first, n).copy_(grads[0]);
    leaves.gradient.k.narrow(0, chunk.first_key, chunk.num_keys()).add_(grads[1]);
    leaves.gradient.w.narrow(0, chunk.first, n).copy_(grads[2]);
  }
  if (differentiate) leaves.backward(weight);
  return total;
}

torch::Tensor sparse_indexer_loss(const IndexerOutput& indexer, const torch::Tensor& selection,
                                  const std::vector<torch::Tensor>& targets, double weight) {
  CHECK(!targets.empty());
  const bool differentiate = weight > 0;
  const int64_t T = selection.size(0), topk = selection.size(1), dim = indexer.k.size(1);
  const double per_token = 1.0 / static_cast<double>(T);
  const auto num_targets = static_cast<double>(targets.size());
  torch::Tensor mean_p = torch::zeros_like(targets[0]);
  torch::Tensor total = torch::zeros({}, indexer.w.options().dtype(torch::kDouble));
  for (const torch::Tensor& p : targets) {
    total.add_(negative_entropy(p), per_token / num_targets);
    mean_p.add_(p, 1 / num_targets);
  }
  Leaves leaves(indexer);
  const torch::Tensor all_keys = indexer.k.detach();
  const int64_t step = std::max<int64_t>(1, kGatheredElements / (topk * dim));
  for (int64_t first = 0; first < T; first += step) {
    const int64_t n = std::min(step, T - first);
    const torch::Tensor selected = selection.narrow(0, first, n);
    const torch::Tensor places = selected.clamp_min(0).to(torch::kLong).flatten();

    torch::AutoGradMode grad_mode(differentiate);
    const torch::Tensor q = leaf(indexer.q.narrow(0, first, n));
    const torch::Tensor k = leaf(all_keys.index_select(0, places).view({n, topk, dim}));
    const torch::Tensor w = leaf(indexer.w.narrow(0, first, n));
    const torch::Tensor dots = torch::relu(torch::bmm(q, k.transpose(1, 2))).to(torch::kFloat);
    const torch::Tensor log_q = torch::bmm(w.to(torch::kFloat).unsqueeze(1), dots)
                                    .squeeze(1)
                                    .masked_fill(selected.lt(0), kMasked)
                                    .log_softmax(-1);
    const torch::Tensor loss = expected_log(mean_p.narrow(0, first, n), log_q).mul(-per_token);
    total.add_(loss.detach());
    if (!differentiate) continue;
    const auto grads = torch::autograd::grad({loss}, {q, k, w});
    torch::NoGradGuard no_grad;
    leaves.gradient.q.narrow(0, first, n).copy_(grads[0]);
    leaves.gradient.k.index_add_(0, places, grads[1].flatten(0, 1).to(torch::kFloat));
    leaves.gradient.w.narrow(0, first, n).copy_(grads[2]);
  }
  if (differentiate) leaves.backward(weight);
  return total;
}

}  // namespace indexcache
