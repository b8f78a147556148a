// moe_route by hand-made cases and by its stated properties.
#include "ops/moe_route/moe_route.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "base/rng.h"
#include "ops/kit/test_device.h"
#include "ops/moe_route/moe_route_impl.h"

namespace indexcache {

static MoeRouteArgs to_device(DeviceOperands& device, MoeRouteArgs args) {
  device.elements(args.logits, args.num_tokens * args.n_routed_experts);
  device.elements(args.correction_bias, args.n_routed_experts);
  const int64_t taken = args.num_experts_per_tok + (args.shared_expert ? 1 : 0);
  device.elements(args.experts, args.num_tokens * taken);
  device.elements(args.expert_weights, args.num_tokens * taken);
  return args;
}

namespace {

constexpr uint64_t kSeed = 20252;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Routed {
  std::vector<int32_t> experts;
  std::vector<float> weights;
};

Routed route(MoeRouteArgs args, const char* name = "ref", int num_threads = 2,
             Device device = Device::kCpu) {
  Routed routed;
  const int64_t taken = args.num_experts_per_tok + (args.shared_expert ? 1 : 0);
  routed.experts.assign(static_cast<size_t>(args.num_tokens * taken), -1);
  routed.weights.assign(routed.experts.size(), NAN);
  args.experts = routed.experts.data();
  args.expert_weights = routed.weights.data();
  run_on(device, moe_route, "moe_route", name, args, num_threads);
  return routed;
}

// With every implementation that this machine can run; they must agree.
Routed route_all(const MoeRouteArgs& args) {
  const Routed ref = route(args);
  for (const OpImpl<MoeRouteArgs>& impl : moe_route_impls()) {
    if (!can_run(impl.device) || !impl.supported(args)) continue;
    const Routed routed = route(args, impl.name, 2, impl.device);
    EXPECT_EQ(routed.experts, ref.experts) << impl.name;
    for (size_t i = 0; i < ref.weights.size(); ++i) {
      if (std::isnan(ref.weights[i])) {
        EXPECT_TRUE(std::isnan(routed.weights[i])) << impl.name;
      } else {
        EXPECT_FLOAT_EQ(routed.weights[i], ref.weights[i]) << impl.name;
      }
    }
  }
  return ref;
}

MoeRouteArgs one_token(const std::vector<float>& logits, int64_t num_experts_per_tok) {
  MoeRouteArgs args;
  args.logits = logits.data();
  args.num_tokens = 1;
  args.n_routed_experts = static_cast<int64_t>(logits.size());
  args.num_experts_per_tok = num_experts_per_tok;
  return args;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

TEST(MoeRoute, TakesTheBestAndNormalises) {
  const std::vector<float> logits = {0.5f, -1, 2, 1};
  MoeRouteArgs args = one_token(logits, 2);
  args.routed_scaling_factor = 2.5f;
  const Routed routed = route_all(args);
  EXPECT_EQ(routed.experts, (std::vector<int32_t>{2, 3}));
  const float sum = sigmoid(2) + sigmoid(1);
  EXPECT_FLOAT_EQ(routed.weights[0], sigmoid(2) / sum * 2.5f);
  EXPECT_FLOAT_EQ(routed.weights[1], sigmoid(1) / sum * 2.5f);

  args.norm_topk_prob = false;
  EXPECT_FLOAT_EQ(route_all(args).weights[1], sigmoid(1) * 2.5f);
}

TEST(MoeRoute, TheSharedExpertTakesEveryToken) {
  const std::vector<float> logits = {0.5f, -1, 2, 1, 3, 1, 2, 0};
  MoeRouteArgs args = one_token(logits, 2);
  args.num_tokens = 2;
  args.n_routed_experts = 4;
  const Routed without = route_all(args);
  args.shared_expert = true;
  const Routed with = route_all(args);
  EXPECT_EQ(with.experts, (std::vector<int32_t>{2, 3, 4, 0, 2, 4}));
  for (const size_t token : {0, 1}) {
    EXPECT_EQ(with.weights[3 * token], without.weights[2 * token]);
    EXPECT_EQ(with.weights[3 * token + 1], without.weights[2 * token + 1]);
    EXPECT_EQ(with.weights[3 * token + 2], 1);
  }
}

TEST(MoeRoute, TiesGoToTheLowerExpert) {
  const std::vector<float> logits = {1, 3, 3, 1, 3, 1};
  EXPECT_EQ(route_all(one_token(logits, 4)).experts, (std::vector<int32_t>{1, 2, 4, 0}));
}

TEST(MoeRoute, BiasChangesTheChoiceAndNotTheWeight) {
  const std::vector<float> logits = {2, 1, 0, -1};
  const std::vector<float> bias = {0, 0, 0, 1};
  MoeRouteArgs args = one_token(logits, 2);
  args.correction_bias = bias.data();
  const Routed routed = route_all(args);
  EXPECT_EQ(routed.experts, (std::vector<int32_t>{3, 0}));
  EXPECT_FLOAT_EQ(routed.weights[0], sigmoid(-1) / (sigmoid(-1) + sigmoid(2)));
  EXPECT_FLOAT_EQ(routed.weights[1], sigmoid(2) / (sigmoid(-1) + sigmoid(2)));
}

TEST(MoeRoute, NanRanksLast) {
  const std::vector<float> logits = {NAN, -50, NAN, 1, -kInfinity};
  const Routed routed = route_all(one_token(logits, 5));
  EXPECT_EQ(routed.experts, (std::vector<int32_t>{3, 1, 4, 0, 2}));
}

TEST(MoeRoute, AllExperts) {
  const std::vector<float> logits = {0, 1, 2};
  const Routed routed = route_all(one_token(logits, 3));
  EXPECT_EQ(routed.experts, (std::vector<int32_t>{2, 1, 0}));
  EXPECT_NEAR(routed.weights[0] + routed.weights[1] + routed.weights[2], 1, 1e-6);
}

TEST(MoeRoute, GroupIsJudgedByItsTwoBest) {
  // Group 0 has the best expert, group 1 the best pair, group 2 nothing.
  const std::vector<float> logits = {4, -4, -4, 2, 2, -4, -3, -3, -3};
  MoeRouteArgs args = one_token(logits, 3);
  args.n_group = 3;
  args.topk_group = 1;
  EXPECT_EQ(route_all(args).experts, (std::vector<int32_t>{3, 4, 5}));
  args.topk_group = 2;
  EXPECT_EQ(route_all(args).experts, (std::vector<int32_t>{0, 3, 4}));
}

TEST(MoeRoute, LeftOutExpertsStayOutEvenBehindNan) {
  const std::vector<float> logits = {0, 0, 0, 5, NAN, NAN};
  MoeRouteArgs args = one_token(logits, 3);
  args.n_group = 2;
  args.topk_group = 1;
  const std::vector<float> bias = {-kInfinity, -kInfinity, -kInfinity, 0, 0, 0};
  args.correction_bias = bias.data();
  const Routed routed = route_all(args);
  // Both groups score -infinity: the lower group is taken.
  EXPECT_EQ(routed.experts, (std::vector<int32_t>{0, 1, 2}));
  const std::vector<float> logits2 = {0, 0, 0, 5, 5, NAN};
  args.logits = logits2.data();
  EXPECT_EQ(route_all(args).experts, (std::vector<int32_t>{3, 4, 5}));
}

TEST(MoeRoute, EveryImplementationAgreesWithRefAndWithItself) {
  Rng rng(kSeed);
  for (const int64_t n_routed_experts : {8, 24, 64, 160, 256}) {
    for (const int64_t n_group : {1, 4}) {
      for (const int64_t num_tokens : {0, 1, 5, 130}) {
        std::vector<float> logits(static_cast<size_t>(num_tokens * n_routed_experts));
        // Quarters: many ties.
        for (float& logit : logits) logit = std::round(rng.normal() * 8) / 4;
        std::vector<float> bias(static_cast<size_t>(n_routed_experts));
        for (float& b : bias) b = std::round(rng.normal() * 4) / 64;
        MoeRouteArgs args;
        args.logits = logits.data();
        args.correction_bias = bias.data();
        args.num_tokens = num_tokens;
        args.n_routed_experts = n_routed_experts;
        args.num_experts_per_tok = std::min<int64_t>(8, n_routed_experts / 2);
        args.n_group = n_group;
        args.topk_group = n_group == 1 ? 1 : 2;
        const Routed ref = route(args, "ref", 1);
        for (const OpImpl<MoeRouteArgs>& impl : moe_route_impls()) {
          if (!can_run(impl.device) || !impl.supported(args)) continue;
          for (const int num_threads : {1, 2, 3}) {
            const Routed routed = route(args, impl.name, num_threads, impl.device);
            ASSERT_EQ(routed.experts, ref.experts) << impl.name;
            for (size_t i = 0; i < ref.weights.size(); ++i) {
              ASSERT_NEAR(routed.weights[i], ref.weights[i], 4 * 0x1.0p-23 * ref.weights[i])
                  << impl.name;
            }
          }
        }
        const int64_t k = args.num_experts_per_tok;
        for (int64_t token = 0; token < num_tokens; ++token) {
          const auto begin = ref.experts.begin() + token * k;
          const std::set<int32_t> distinct(begin, begin + k);
          ASSERT_EQ(static_cast<int64_t>(distinct.size()), k);
          std::set<int64_t> groups;
          for (const int32_t expert : distinct)
            groups.insert(expert / (n_routed_experts / n_group));
          ASSERT_LE(static_cast<int64_t>(groups.size()), args.topk_group);
        }
      }
    }
  }
}

}  // namespace
}  // namespace indexcache
