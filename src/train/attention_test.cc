// Sparse attention, forward and backward, against the same thing written with autograd's own
// operations.
#include "train/attention.h"

//
#include <gtest/gtest.h>

#include "base/rng.h"

namespace indexcache {
namespace {

// i32 [T, k]: distinct earlier places, fewer than k for the first tokens.
torch::Tensor random_selection(int64_t num_tokens, int64_t k, uint64_t seed) {
  Rng rng(seed);
  torch::Tensor selection = torch::full({num_tokens, k}, -1, torch::kInt);
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::vector<int32_t> places;
    for (int64_t s = 0; s <= t; ++s) places.push_back(static_cast<int32_t>(s));
    for (int64_t i = 0; i < std::min(k, t + 1); ++i) {
      std::swap(places[static_cast<size_t>(i)],
                places[static_cast<size_t>(
                    i + static_cast<int64_t>(rng.below(static_cast<uint64_t>(t + 1 - i))))]);
      selection[t][i] = places[static_cast<size_t>(i)];
    }
  }
  return selection;
}

TEST(SparseAttention, AgreesWithAutogradForwardAndBackward) {
  for (const uint64_t seed : {1, 2, 3}) {
    torch::manual_seed(seed);
    const int64_t T = 37, heads = 3, dim = 12, value_dim = 8, k = 9;
    const double scale = 0.4;
    const auto leaf = [](at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); };
    const torch::Tensor q = leaf({T, heads, dim}), rows = leaf({T, dim});
    const torch::Tensor selection = random_selection(T, k, seed);

    const torch::Tensor gathered =
        rows.index({selection.clamp_min(0).to(torch::kLong)});  // [T, k, D]
    const torch::Tensor p = torch::einsum("thd,tkd->thk", {q, gathered})
                                .mul(scale)
                                .masked_fill(selection.lt(0).unsqueeze(1), -INFINITY)
                                .softmax(-1);
    const torch::Tensor expected =
        torch::einsum("thk,tkv->thv", {p, gathered.narrow(2, 0, value_dim)});
    const torch::Tensor upstream = torch::randn_like(expected);
    const auto expected_grads = torch::autograd::grad({expected}, {q, rows}, {upstream});

    const SparseAttention got = sparse_attention(q, rows, selection, value_dim, scale);
    EXPECT_LE((got.output - expected).abs().max().item<double>(), 1e-5);
    EXPECT_LE((got.probabilities - p.mean(1)).abs().max().item<double>(), 1e-6);
    const auto grads = torch::autograd::grad({got.output}, {q, rows}, {upstream});
    for (size_t i = 0; i < 2; ++i)
      EXPECT_LE(((grads[i] - expected_grads[i]).norm() / expected_grads[i].norm()).item<double>(),
                1e-5);
  }
}

TEST(Chunks, CoverEveryQueryOnceWithAllItsKeys) {
  std::vector<BatchDocument> documents;
  for (const size_t length : {5, 1, 40, 17, 3})
    documents.push_back({std::vector<int32_t>(length, 1), std::vector<float>(length, 1.0f)});
  const Batch batch = make_batch(documents, torch::kCPU);
  for (const int64_t max_pairs : {1, 50, 300, 1 << 20}) {
    int64_t next = 0;
    for (const Chunk& chunk : chunks(batch, max_pairs)) {
      EXPECT_EQ(chunk.first, next);
      EXPECT_LE(chunk.first_key, chunk.first);
      EXPECT_TRUE(chunk.num_queries() == 1 || chunk.num_queries() * chunk.num_keys() <= max_pairs);
      for (int64_t t = chunk.first; t < chunk.end; ++t)
        EXPECT_LE(chunk.first_key, batch.document_start[static_cast<size_t>(t)]);
      next = chunk.end;
    }
    EXPECT_EQ(next, batch.num_tokens);
  }
}

}  // namespace
}  // namespace indexcache
