// Checks the contract of moe_route and chooses an implementation.
#include "ops/moe_route/moe_route.h"

#include "ops/moe_route/moe_route_impl.h"

namespace indexcache {

namespace {

constexpr OpImpl<MoeRouteArgs> kMoeRouteImpls[] = {
#ifdef INDEXCACHE_CUDA
    {"cuda", moe_route_cuda_supported, moe_route_cuda, Device::kCuda},
#endif
    {"ref", [](const MoeRouteArgs&) { return true; }, moe_route_ref},
};

}  // namespace

std::span<const OpImpl<MoeRouteArgs>> moe_route_impls() { return kMoeRouteImpls; }

Cost moe_route_cost(const MoeRouteArgs& args) {
  const auto scores = static_cast<double>(args.num_tokens * args.n_routed_experts);
  const auto outputs = static_cast<double>(args.num_tokens * args.num_experts_per_tok);
  return {.flops = 4 * scores, .bytes = 4 * scores + 8 * outputs};
}

void moe_route(Exec& exec, const MoeRouteArgs& args) {
  CHECK_GE(args.num_tokens, 0);
  CHECK_GE(args.n_routed_experts, 1);
  CHECK_GE(args.n_group, 1);
  CHECK_EQ(args.n_routed_experts % args.n_group, 0);
  CHECK_GE(args.topk_group, 1);
  CHECK_LE(args.topk_group, args.n_group);
  const int64_t group_experts = args.n_routed_experts / args.n_group;
  if (args.n_group > 1) CHECK_GE(group_experts, 2);  // a group is judged by its two best
  CHECK_GE(args.num_experts_per_tok, 1);
  CHECK_LE(args.num_experts_per_tok,
           args.n_group > 1 ? args.topk_group * group_experts : args.n_routed_experts);
  if (args.num_tokens == 0) return;
  CHECK(args.logits != nullptr);
  CHECK(args.experts != nullptr);
  CHECK(args.expert_weights != nullptr);
  run_op(exec, "moe_route", kMoeRouteImpls, args, moe_route_cost(args));
}

}  // namespace indexcache
