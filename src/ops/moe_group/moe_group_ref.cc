// The meaning of moe_group. Also fast enough on the CPU: some nanoseconds a pair.
#include <vector>

#include "ops/moe_group/moe_group.h"

namespace indexcache {

void moe_group_ref(Exec&, const MoeGroupArgs& args) {
  const int64_t pairs = args.num_tokens * args.num_experts_per_tok;
  std::vector<int32_t> next(static_cast<size_t>(args.n_routed_experts + 1));
  for (int64_t i = 0; i < pairs; ++i) {
    CHECK_GE(args.experts[i], 0);
    CHECK_LT(args.experts[i], args.n_routed_experts);
    ++next[static_cast<size_t>(args.experts[i] + 1)];
  }
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  for (size_t e = 0; e < next.size(); ++e) args.row_begin[e] = next[e];
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t slot = next[static_cast<size_t>(args.experts[i])]++;
    args.slots[i] = slot;
    args.slot_tokens[slot] = static_cast<int32_t>(i / args.num_experts_per_tok);
  }
}

}  // namespace indexcache
