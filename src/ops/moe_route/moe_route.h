// Which experts a token goes to, and with what weight (DeepSeek-V3 sections 2.1.2; GLM uses n_group
// = 1).
//
//   s = sigmoid(logits);  choice = s + correction_bias
//   with n_group > 1: a group's score is the sum of its two best `choice`; experts outside the
//   topk_group best groups are left out the num_experts_per_tok experts with the highest `choice`
//   are taken, ties to the lower expert weight = s / (sum of the taken s + 1e-20 if norm_topk_prob)
//   * routed_scaling_factor
//
// NaN ranks as -infinity. Computed in f32; parity with ref is exact in `experts`, 4 ulp in
// `expert_weights`.
#pragma once

#include "ops/kit/exec.h"

namespace indexcache {

struct MoeRouteArgs {
  const float* logits = nullptr;           // [num_tokens, n_routed_experts]
  const float* correction_bias = nullptr;  // [n_routed_experts]; null means zero
  int64_t num_tokens = 0;
  int64_t n_routed_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t n_group = 1;  // divides n_routed_experts
  int64_t topk_group = 1;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1;
  // Each token also goes to expert n_routed_experts, last and with weight 1: rows of the outputs
  // have num_experts_per_tok + 1 elements.
  bool shared_expert = false;
  int32_t* experts = nullptr;       // out [num_tokens, num_experts_per_tok], best first
  float* expert_weights = nullptr;  // out, same shape
};

void moe_route(Exec& exec, const MoeRouteArgs& args);
Cost moe_route_cost(const MoeRouteArgs& args);

}  // namespace indexcache
