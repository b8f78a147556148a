#include "ops/moe_group/moe_group.h"

#include <gtest/gtest.h>

#include "ops/kit/testing.h"

namespace indexcache {

static MoeGroupArgs to_device(DeviceOperands& device, MoeGroupArgs args) {
  const int64_t pairs = args.num_tokens * args.num_experts_per_tok;
  device.elements(args.experts, pairs);
  device.elements(args.row_begin, args.n_routed_experts + 1);
  device.elements(args.slots, pairs);
  device.elements(args.slot_tokens, pairs);
  return args;
}

namespace {

struct Grouped {
  std::vector<int32_t> row_begin, slots, slot_tokens;
};

Grouped group(const std::vector<int32_t>& experts, int64_t per_token, int64_t num_experts,
              const OpImpl<MoeGroupArgs>& impl) {
  Grouped out{std::vector<int32_t>(static_cast<size_t>(num_experts + 1), -7),
              std::vector<int32_t>(experts.size(), -7), std::vector<int32_t>(experts.size(), -7)};
  run_on<MoeGroupArgs>(
      impl.device, moe_group, "moe_group", impl.name,
      {experts.data(), static_cast<int64_t>(experts.size()) / per_token, per_token, num_experts,
       out.row_begin.data(), out.slots.data(), out.slot_tokens.data()},
      2);
  return out;
}

TEST(MoeGroup, IsASortThatKeepsTheOrder) {
  for (const OpImpl<MoeGroupArgs>& impl : moe_group_impls()) {
    if (!can_run(impl.device)) continue;
    const Grouped out = group({2, 0, 3, 2, 0, 2}, 2, 5, impl);
    EXPECT_EQ(out.row_begin, (std::vector<int32_t>{0, 2, 2, 5, 6, 6})) << impl.name;
    EXPECT_EQ(out.slots, (std::vector<int32_t>{2, 0, 5, 3, 1, 4})) << impl.name;
    EXPECT_EQ(out.slot_tokens, (std::vector<int32_t>{0, 2, 0, 1, 2, 1})) << impl.name;
  }
}

TEST(MoeGroup, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  const OpImpl<MoeGroupArgs>& ref = moe_group_impls().back();
  for (const OpImpl<MoeGroupArgs>& impl : moe_group_impls()) {
    if (!can_run(impl.device)) continue;
    for (const int64_t num_experts : {1, 8, 65, 256}) {
      for (const int64_t num_tokens : {0, 1, 127, 300}) {
        std::vector<int32_t> experts(static_cast<size_t>(num_tokens * 4));
        for (int32_t& e : experts)
          e = static_cast<int32_t>(rng.below(static_cast<uint64_t>(num_experts)));
        const Grouped want = group(experts, 4, num_experts, ref),
                      got = group(experts, 4, num_experts, impl);
        EXPECT_EQ(got.row_begin, want.row_begin) << impl.name;
        EXPECT_EQ(got.slots, want.slots) << impl.name;
        EXPECT_EQ(got.slot_tokens, want.slot_tokens) << impl.name;
      }
    }
  }
}

}  // namespace
}  // namespace indexcache
