// The indexer losses: their meaning by obvious loops, Proposition 1, and finite differences.
#include "train/indexer.h"

//
#include <gtest/gtest.h>

namespace indexcache {
namespace {

constexpr int64_t kTokens = 23, kHeads = 3, kIndexHeads = 4, kDim = 8, kIndexDim = 6, kTopk = 7;
constexpr double kScale = 0.3;

struct Problem {
  Batch batch;
  IndexerOutput indexer;
  std::vector<DenseTarget> targets;
};

Problem make(uint64_t seed, int num_targets) {
  torch::manual_seed(seed);
  const auto f64 = torch::TensorOptions().dtype(torch::kDouble);
  Problem problem;
  std::vector<int32_t> tokens(14, 1), more(9, 2);
  problem.batch = make_batch(
      {{tokens, std::vector<float>(14, 1.0f)}, {more, std::vector<float>(9, 1.0f)}}, torch::kCPU);
  const auto leaf = [&](at::IntArrayRef shape) {
    return torch::randn(shape, f64).to(torch::kFloat).requires_grad_();
  };
  problem.indexer = {leaf({kTokens, kIndexHeads, kIndexDim}), leaf({kTokens, kIndexDim}),
                     leaf({kTokens, kIndexHeads})};
  for (int i = 0; i < num_targets; ++i)
    problem.targets.push_back(
        {torch::randn({kTokens, kHeads, kDim}) * 2, torch::randn({kTokens, kHeads, kDim}) * 2});
  return problem;
}

bool visible(int64_t t, int64_t s) { return s <= t && (t < 14) == (s < 14); }

// I(t, s) for all pairs, with gradient; obvious.
torch::Tensor all_scores(const IndexerOutput& x) {
  const torch::Tensor dots = torch::relu(torch::einsum("thd,sd->ths", {x.q, x.k}));
  return torch::einsum("ths,th->ts", {dots, x.w});
}

torch::Tensor visible_mask() {
  torch::Tensor mask = torch::zeros({kTokens, kTokens}, torch::kBool);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t s = 0; s < kTokens; ++s) mask[t][s] = visible(t, s);
  return mask;
}

torch::Tensor softmax_where(const torch::Tensor& scores, const torch::Tensor& mask) {
  return scores.masked_fill(mask.logical_not(), -INFINITY).softmax(-1);
}

// KL(p || q) summed over tokens, q with gradient.
torch::Tensor kl(const torch::Tensor& p, const torch::Tensor& q) {
  const torch::Tensor used = p.gt(0);
  return torch::where(used, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()),
                      torch::zeros_like(p))
      .sum();
}

std::vector<torch::Tensor> attention_of(const Problem& problem, const torch::Tensor& mask) {
  std::vector<torch::Tensor> p;
  for (const DenseTarget& target : problem.targets) {
    const torch::Tensor s = torch::einsum("thd,shd->hts", {target.q, target.k}) * kScale;
    p.push_back(softmax_where(s, mask).mean(0));
  }
  return p;
}

std::vector<torch::Tensor> take_gradients(const IndexerOutput& x) {
  std::vector<torch::Tensor> grads;
  for (const torch::Tensor& leaf : {x.q, x.k, x.w}) {
    grads.push_back(leaf.grad().clone());
    leaf.grad().zero_();
  }
  return grads;
}

void expect_close(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_GT(b[i].norm().item<double>(), 1e-6);
    EXPECT_LE(((a[i] - b[i]).norm() / b[i].norm()).item<double>(), 1e-4) << i;
  }
}

TEST(IndexerLoss, DenseMultiLayerIsThePapersSum) {
  for (const int num_targets : {1, 4}) {
    Problem problem = make(11, num_targets);
    const torch::Tensor mask = visible_mask();
    const torch::Tensor q = softmax_where(all_scores(problem.indexer), mask);
    // L_multi as written: the mean over layers of each layer's KL.
    torch::Tensor expected = torch::zeros({});
    for (const torch::Tensor& p : attention_of(problem, mask)) expected = expected + kl(p, q);
    expected = expected / num_targets / kTokens;
    expected.backward();
    const auto expected_gradients = take_gradients(problem.indexer);
    const torch::Tensor loss =
        dense_indexer_loss(problem.indexer, problem.targets, kScale, problem.batch, 1.0);
    EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-5);
    expect_close(take_gradients(problem.indexer), expected_gradients);
  }
}

// Proposition 1: the gradient of the mean of the KLs is the gradient of the KL of the mean; the
// values differ.
TEST(IndexerLoss, GradientOfMultiLayerIsThatOfTheAveragedTarget) {
  Problem problem = make(12, 3);
  const torch::Tensor mask = visible_mask();
  const auto p = attention_of(problem, mask);
  const torch::Tensor averaged =
      kl((p[0] + p[1] + p[2]) / 3, softmax_where(all_scores(problem.indexer), mask)) / kTokens;
  averaged.backward();
  const auto expected = take_gradients(problem.indexer);
  const torch::Tensor multi =
      dense_indexer_loss(problem.indexer, problem.targets, kScale, problem.batch, 1.0);
  expect_close(take_gradients(problem.indexer), expected);
  EXPECT_GT(multi.item<double>(), averaged.item<double>() + 1e-3);  // Jensen
}

TEST(IndexerLoss, SparseIsThePapersSumOverTheSelection) {
  Problem problem = make(13, 3);
  const torch::Tensor selection = select_tokens(problem.indexer, kTopk, problem.batch);
  torch::Tensor mask = torch::zeros({kTokens, kTokens}, torch::kBool);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t i = 0; i < kTopk; ++i)
      if (const int64_t s = selection[t][i].item<int64_t>(); s >= 0) mask[t][s] = true;
  const torch::Tensor q = softmax_where(all_scores(problem.indexer), mask);
  std::vector<torch::Tensor> targets;
  torch::Tensor expected = torch::zeros({});
  for (const torch::Tensor& p : attention_of(problem, mask)) {
    expected = expected + kl(p, q);
    targets.push_back(
        p.gather(1, selection.clamp_min(0).to(torch::kLong)).masked_fill(selection.lt(0), 0));
  }
  expected = expected / 3 / kTokens;
  expected.backward();
  const auto expected_gradients = take_gradients(problem.indexer);
  const torch::Tensor loss = sparse_indexer_loss(problem.indexer, selection, targets, 1.0);
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-5);
  expect_close(take_gradients(problem.indexer), expected_gradients);
}

TEST(IndexerLoss, AgreesWithFiniteDifferences) {
  Problem problem = make(14, 2);
  const torch::Tensor selection = select_tokens(problem.indexer, kTopk, problem.batch);
  std::vector<torch::Tensor> sparse_targets;
  for (int i = 0; i < 2; ++i)
    sparse_targets.push_back(
        torch::randn({kTokens, kTopk}).masked_fill(selection.lt(0), -INFINITY).softmax(-1));
  const auto dense = [&](double weight) {
    return dense_indexer_loss(problem.indexer, problem.targets, kScale, problem.batch, weight);
  };
  const auto sparse = [&](double weight) {
    return sparse_indexer_loss(problem.indexer, selection, sparse_targets, weight);
  };
  const std::function<torch::Tensor(double)> losses[] = {dense, sparse};
  for (const auto& loss : losses) {
    loss(1.0);
    const auto gradients = take_gradients(problem.indexer);
    const torch::Tensor leaves[] = {problem.indexer.q, problem.indexer.k, problem.indexer.w};
    for (size_t i = 0; i < 3; ++i) {
      torch::NoGradGuard no_grad;
      const torch::Tensor direction = torch::randn_like(leaves[i]);
      const double step = 2e-4;  // small: relu has kinks
      leaves[i].add_(direction, step);
      const double above = loss(0).item<double>();
      leaves[i].sub_(direction, 2 * step);
      const double below = loss(0).item<double>();
      leaves[i].add_(direction, step);
      const double expected = (above - below) / (2 * step);
      EXPECT_NEAR(gradients[i].mul(direction).sum().item<double>(), expected,
                  0.02 * std::abs(expected) + 2e-3);
    }
  }
}

TEST(SelectTokens, AreTheBestVisibleOnes) {
  Problem problem = make(15, 0);
  torch::NoGradGuard no_grad;
  const torch::Tensor scores = all_scores(problem.indexer);
  const torch::Tensor selection = select_tokens(problem.indexer, kTopk, problem.batch);
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<std::pair<float, int64_t>> order;
    for (int64_t s = 0; s < kTokens; ++s)
      if (visible(t, s)) order.emplace_back(-scores[t][s].item<float>(), s);
    std::sort(order.begin(), order.end());
    std::set<int64_t> expected, got;
    for (size_t i = 0; i < order.size() && i < kTopk; ++i) expected.insert(order[i].second);
    int64_t padding = 0;
    for (int64_t i = 0; i < kTopk; ++i) {
      const int64_t s = selection[t][i].item<int64_t>();
      s < 0 ? void(++padding) : void(got.insert(s));
    }
    EXPECT_EQ(padding, kTopk - static_cast<int64_t>(expected.size()));
    // Scores that tie at 0 (all dots below 0) may be chosen either way.
    for (const int64_t s : got) {
      EXPECT_TRUE(visible(t, s));
      EXPECT_TRUE(expected.contains(s) ||
                  scores[t][s].item<float>() == scores[t][*expected.rbegin()].item<float>() ||
                  scores[t][s].item<float>() == 0);
    }
  }
}

}  // namespace
}  // namespace indexcache
