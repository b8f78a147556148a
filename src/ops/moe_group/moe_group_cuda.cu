// One block an expert: it counts the pairs of lower experts, and then those of its own in order.
#include "ops/kit/cuda.cuh"
#include "ops/moe_group/moe_group.h"

namespace indexcache {

namespace {

constexpr int kGroupThreads = 512;

__global__ void __launch_bounds__(kGroupThreads) moe_group_kernel(MoeGroupArgs args) {
  wait_for_previous();
  const int32_t pairs = static_cast<int32_t>(args.num_tokens * args.num_experts_per_tok);
  const int32_t expert = static_cast<int32_t>(blockIdx.x);
  uint32_t lower = 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < pairs; i += kGroupThreads)
    lower += args.experts[i] < expert;
  uint32_t next = block_scan(lower).total;
  if (threadIdx.x == 0) args.row_begin[expert] = static_cast<int32_t>(next);
  if (threadIdx.x == 0 && blockIdx.x == 0) args.row_begin[args.n_routed_experts] = pairs;
  for (int32_t begin = 0; begin < pairs; begin += kGroupThreads) {
    const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
    const bool own = i < pairs && args.experts[i] == expert;
    const BlockScan scan = block_scan(own ? 1 : 0);
    if (own) {
      const int32_t slot = static_cast<int32_t>(next + scan.before);
      args.slots[i] = slot;
      args.slot_tokens[slot] = i / static_cast<int32_t>(args.num_experts_per_tok);
    }
    next += scan.total;
  }
}

}  // namespace

void moe_group_cuda(Exec& exec, const MoeGroupArgs& args) {
  launch(moe_group_kernel, blocks_for(args.n_routed_experts, 1), kGroupThreads, 0, exec.cuda(),
         args);
}

}  // namespace indexcache
