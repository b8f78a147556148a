// Checks the contract of moe_group and chooses an implementation.
#include "ops/moe_group/moe_group.h"

#include <limits>

namespace indexcache {

namespace {

constexpr OpImpl<MoeGroupArgs> kImpls[] = {
#ifdef INDEXCACHE_CUDA
    {"cuda", [](const MoeGroupArgs&) { return true; }, moe_group_cuda, Device::kCuda},
#endif
    {"ref", [](const MoeGroupArgs&) { return true; }, moe_group_ref},
};

}  // namespace

std::span<const OpImpl<MoeGroupArgs>> moe_group_impls() { return kImpls; }

void moe_group(Exec& exec, const MoeGroupArgs& args) {
  CHECK_GE(args.num_tokens, 0);
  CHECK_GE(args.num_experts_per_tok, 1);
  CHECK_GE(args.n_routed_experts, 1);
  const int64_t pairs = args.num_tokens * args.num_experts_per_tok;
  CHECK_LE(pairs, std::numeric_limits<int32_t>::max());
  CHECK(args.row_begin != nullptr);
  run_op(exec, "moe_group", kImpls, args, {0, 12.0 * static_cast<double>(pairs)});
}

}  // namespace indexcache
