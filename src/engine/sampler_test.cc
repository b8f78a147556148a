#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
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

TEST(NegativeLogLikelihood, IsExact) {
  EXPECT_NEAR(negative_log_likelihood(std::vector<float>{0, 0, 0, 0}, 2), std::log(4.0), 1e-12);
  EXPECT_NEAR(negative_log_likelihood(std::vector<float>{1000, 0}, 0), 0, 1e-12);
  EXPECT_NEAR(negative_log_likelihood(std::vector<float>{1000, 0}, 1), 1000, 1e-9);
}

}  // namespace
}  // namespace indexcache
