// The meaning of moe_route: obvious loops. Also fast enough: a token costs some microseconds beside
// the hundreds of its experts.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "ops/moe_route/moe_route_impl.h"

namespace indexcache {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float ranked(float score) { return std::isnan(score) ? kMinusInfinity : score; }

// Leaves the `count` candidates with the highest score, best first, ties to the lower index.
void keep_best(const std::vector<float>& score, int64_t count, std::vector<int32_t>& candidates) {
  std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(),
                    [&](int32_t a, int32_t b) {
                      const float score_a = score[static_cast<size_t>(a)];
                      const float score_b = score[static_cast<size_t>(b)];
                      return score_a != score_b ? score_a > score_b : a < b;
                    });
  candidates.resize(static_cast<size_t>(count));
}

std::vector<int32_t> all_of(int64_t count) {
  std::vector<int32_t> indices(static_cast<size_t>(count));
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

// The experts of the topk_group best groups.
std::vector<int32_t> eligible_experts(const MoeRouteArgs& args, const std::vector<float>& choice) {
  if (args.n_group == 1) return all_of(args.n_routed_experts);
  const int64_t group_experts = args.n_routed_experts / args.n_group;
  std::vector<float> group_score;
  for (int64_t g = 0; g < args.n_group; ++g) {
    std::vector<float> group(choice.begin() + g * group_experts,
                             choice.begin() + (g + 1) * group_experts);
    std::partial_sort(group.begin(), group.begin() + 2, group.end(), std::greater<>());
    group_score.push_back(ranked(group[0] + group[1]));
  }
  std::vector<int32_t> groups = all_of(args.n_group);
  keep_best(group_score, args.topk_group, groups);
  std::vector<int32_t> experts;
  for (const int32_t g : groups) {
    for (int64_t e = 0; e < group_experts; ++e)
      experts.push_back(static_cast<int32_t>(g * group_experts + e));
  }
  return experts;
}

void route_token(const MoeRouteArgs& args, int64_t token) {
  const auto num_experts = static_cast<size_t>(args.n_routed_experts);
  const float* logits = args.logits + token * args.n_routed_experts;
  std::vector<float> s(num_experts);
  std::vector<float> choice(num_experts);
  for (size_t e = 0; e < num_experts; ++e) {
    s[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    choice[e] = ranked(s[e] + (args.correction_bias != nullptr ? args.correction_bias[e] : 0.0f));
  }
  std::vector<int32_t> taken = eligible_experts(args, choice);
  keep_best(choice, args.num_experts_per_tok, taken);

  float divisor = 1;
  if (args.norm_topk_prob) {
    divisor = 1e-20f;
    for (const int32_t e : taken) divisor += s[static_cast<size_t>(e)];
  }
  const int64_t row = token * (args.num_experts_per_tok + (args.shared_expert ? 1 : 0));
  for (int64_t i = 0; i < args.num_experts_per_tok; ++i) {
    const int32_t expert = taken[static_cast<size_t>(i)];
    args.experts[row + i] = expert;
    args.expert_weights[row + i] =
        s[static_cast<size_t>(expert)] / divisor * args.routed_scaling_factor;
  }
  if (args.shared_expert) {
    args.experts[row + args.num_experts_per_tok] = static_cast<int32_t>(args.n_routed_experts);
    args.expert_weights[row + args.num_experts_per_tok] = 1;
  }
}

}  // namespace

void moe_route_ref(Exec& exec, const MoeRouteArgs& args) {
  constexpr int64_t kTokensPerItem = 16;
  const int64_t num_items = (args.num_tokens + kTokensPerItem - 1) / kTokensPerItem;
  exec.pool.parallel_for(num_items, [&](int64_t item, int) {
    const int64_t end = std::min((item + 1) * kTokensPerItem, args.num_tokens);
    for (int64_t token = item * kTokensPerItem; token < end; ++token) route_token(args, token);
  });
}

}  // namespace indexcache
