#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "base/error.h"

namespace indexcache {
namespace {

TEST(Sampler, GreedyTakesTheLowestOfEqualBest) {
  Sampler sampler({});
  EXPECT_EQ(sampler.next(std::vector<float>{-1, 3, 0, 3}), 1);
  EXPECT_EQ(sampler.next(std::vector<float>{-INFINITY, -INFINITY, -5}), 2);
}

TEST(Sampler, NoRightTokenIsAnError) {
  Sampler sampler({});
  EXPECT_THROW(sampler.next(std::vector<float>{1, NAN}), Error);
  EXPECT_THROW(sampler.next(std::vector<float>{-INFINITY, -INFINITY}), Error);
}

TEST(Sampler, FollowsTheDistribution) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  Sampler sampler({.temperature = 1, .seed = 7});
  std::map<int32_t, int> counts;
  const int kDraws = 40000;
  for (int i = 0; i < kDraws; ++i) ++counts[sampler.next(logits)];
  for (int32_t id = 0; id < 4; ++id) {
    const double p = std::exp(logits[static_cast<size_t>(id)]),
                 sigma = std::sqrt(p * (1 - p) / kDraws);
    EXPECT_NEAR(counts[id] / static_cast<double>(kDraws), p, 5 * sigma)
        << "token " << id << ", seed 7";
  }
}

TEST(Sampler, CutsTheTail) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  auto seen = [&](SamplingParams params) {
    params.temperature = 1;
    params.seed = 11;
    Sampler sampler(params);
    int32_t highest = 0;
    for (int i = 0; i < 4000; ++i) highest = std::max(highest, sampler.next(logits));
    return highest;
  };
  EXPECT_EQ(seen({}), 3);
  EXPECT_EQ(seen({.top_k = 2}), 1);
  EXPECT_EQ(seen({.top_p = 0.79}), 1) << "0.5 + 0.3 reaches 0.79";
  EXPECT_EQ(seen({.top_p = 0.81}), 2);
  EXPECT_EQ(seen({.top_p = 1e-9}), 0);
  EXPECT_EQ(seen({.min_p = 0.29}), 2) << "0.15 / 0.5 = 0.3";
}

TEST(Sampler, AtTheEdgesOfItsParameters) {
  const std::vector<float> logits = {1, 3, 3, 2.9999f}, equal(5, -7.5f), huge = {3e38f, -3e38f, 0};
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const auto next = [&](SamplingParams params, const std::vector<float>& row) {
      params.seed = seed;
      return Sampler(params).next(row);
    };
    EXPECT_EQ(next({.temperature = 0}, logits), 1);
    EXPECT_EQ(next({.temperature = 2, .top_k = 1}, logits), 1);
    EXPECT_EQ(next({.temperature = 2, .top_p = 1e-300}, logits), 1);
    EXPECT_EQ(next({.temperature = 2, .top_p = 1e-300}, equal), 0);
    EXPECT_EQ(next({.temperature = 0}, equal), 0);
    EXPECT_EQ(next({.temperature = 2}, huge), 0);
    const int32_t cold = next({.temperature = 1e-9, .top_k = 100}, logits);
    EXPECT_TRUE(cold == 1 || cold == 2) << cold;
    EXPECT_LT(next({.temperature = 1e-300, .min_p = 1}, equal), 5);
  }
}

TEST(Sampler, SameSeedSameTokens) {
  std::vector<float> logits(100);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>((i * 37) % 11);
  Sampler a({.temperature = 0.8, .seed = 3}), b({.temperature = 0.8, .seed = 3}),
      c({.temperature = 0.8, .seed = 4});
  int differ = 0;
  for (int i = 0; i < 200; ++i) {
    const int32_t token = a.next(logits);
    EXPECT_EQ(token, b.next(logits));
    differ += token != c.next(logits);
  }
  EXPECT_GT(differ, 0);
}

TEST(Sampler, ParamsAreChecked) {
  for (const SamplingParams& bad :
       {SamplingParams{.temperature = -1}, SamplingParams{.temperature = NAN},
        SamplingParams{.top_k = -1}, SamplingParams{.top_p = 0}, SamplingParams{.top_p = 1.1},
        SamplingParams{.min_p = -0.1}}) {
    EXPECT_THROW(check_sampling_params(bad), Error);
  }
  check_sampling_params({.temperature = 1, .top_k = 40, .top_p = 0.95, .min_p = 0.05});
}

// Whatever the cuts, a draw is the one that a full sort of the distribution gives.
TEST(Sampler, IsTheDrawFromAFullSort) {
  constexpr uint64_t kSeed = 20261125;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  Rng rng(kSeed);
  for (const SamplingParams& params :
       {SamplingParams{.temperature = 1, .seed = 5},
        SamplingParams{.temperature = 3, .top_p = 0.9, .seed = 6},
        SamplingParams{.temperature = 50, .top_k = 700, .min_p = 0.99, .seed = 7},
        SamplingParams{.temperature = 2, .top_k = 300, .top_p = 0.99, .min_p = 0.01, .seed = 8}}) {
    Sampler sampler(params);
    Rng draws(params.seed);
    for (int step = 0; step < 200; ++step) {
      std::vector<float> logits(1000);
      for (float& logit : logits) logit = std::round(rng.normal() * 8) / 4;  // many are equal
      std::vector<std::pair<float, int32_t>> order;
      for (size_t i = 0; i < logits.size(); ++i)
        order.emplace_back(-logits[i], static_cast<int32_t>(i));
      std::sort(order.begin(), order.end());
      if (params.top_k > 0) order.resize(static_cast<size_t>(params.top_k));
      std::vector<double> weights;
      double total = 0, mass = 0;
      for (const auto& [negative, id] : order) {
        weights.push_back(std::exp((order[0].first - negative) / params.temperature));
        total += weights.back();
      }
      size_t keep = 0;
      while (keep < weights.size() && (keep == 0 || mass < params.top_p * total))
        mass += weights[keep++];
      while (keep > 1 && weights[keep - 1] < params.min_p) mass -= weights[--keep];
      double target = draws.uniform() * mass;
      size_t chosen = 0;
      while (chosen + 1 < keep && (target -= weights[chosen]) >= 0) ++chosen;
      ASSERT_EQ(sampler.next(logits), order[chosen].second) << step;
    }
  }
}

TEST(TokenLogprob, RanksAndBest) {
  const std::vector<float> logits = {1, 3, 2, 3, -INFINITY};
  const double total = std::log(std::exp(1.) + 2 * std::exp(3.) + std::exp(2.));
  const TokenLogprob found = token_logprob(logits, 3, 3);
  EXPECT_EQ(found.token, 3);
  EXPECT_EQ(found.rank, 1) << "equal logits rank by token id";
  EXPECT_NEAR(found.logprob, 3 - total, 1e-14);
  ASSERT_EQ(found.top.size(), 3u);
  EXPECT_EQ(found.top[0].first, 1);
  EXPECT_EQ(found.top[1].first, 3);
  EXPECT_EQ(found.top[2].first, 2);
  EXPECT_EQ(found.top[1].second, found.logprob) << "the same number";
  EXPECT_TRUE(token_logprob(logits, 1, 0).top.empty());
  EXPECT_EQ(token_logprob(logits, 0, 10).top.size(), 5u) << "no more than there are";
  EXPECT_EQ(token_logprob(logits, 4, 0).logprob, -INFINITY);
  EXPECT_EQ(token_logprob(logits, 4, 0).rank, 4);
}

TEST(AllFinite, SeesEveryPlaceAndKind) {
  std::vector<float> values(100, 1.5f);
  values[3] = -std::numeric_limits<float>::max();
  values[4] = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(all_finite(values));
  EXPECT_TRUE(all_finite({}));
  for (size_t i = 0; i < values.size(); ++i) {
    for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
      std::vector<float> spoiled = values;
      spoiled[i] = bad;
      EXPECT_FALSE(all_finite(spoiled));
    }
  }
}

TEST(NegativeLogLikelihood, IsExact) {
  EXPECT_NEAR(negative_log_likelihood(std::vector<float>{0, 0, 0, 0}, 2), std::log(4.0), 1e-12);
  EXPECT_NEAR(negative_log_likelihood(std::vector<float>{1000, 0}, 0), 0, 1e-12);
  EXPECT_NEAR(negative_log_likelihood(std::vector<float>{1000, 0}, 1), 1000, 1e-9);
}

}  // namespace
}  // namespace indexcache
