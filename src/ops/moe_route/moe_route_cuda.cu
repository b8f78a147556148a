#include "ops/kit/cuda.cuh"
#include "ops/moe_route/moe_route_impl.h"

namespace indexcache {

namespace {

constexpr int kRouteWarps = 4;

__device__ __forceinline__ float ranked(float score) {
  return score == score ? score : minus_infinity();
}

// The index of the highest of score[0, count) that is not taken, ties to the lower one; every lane
// gets it. Scores are not NaN.
__device__ __forceinline__ int best_of(const float* score, const uint8_t* taken, int count) {
  float best = 0;
  int at = -1;
  for (int i = threadIdx.x % kWarpLanes; i < count; i += kWarpLanes) {
    if (taken[i] == 0 && (at < 0 || score[i] > best)) best = score[i], at = i;
  }
  for (int bits = kWarpLanes / 2; bits > 0; bits /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, bits);
    const int other_at = __shfl_xor_sync(kAllLanes, at, bits);
    if (other_at < 0) continue;
    if (at < 0 || other > best || (other == best && other_at < at)) best = other, at = other_at;
  }
  return at;
}

// One warp a token. Of each warp in shared memory: s and choice of the experts, scores of the
// groups, and which experts and groups are taken.
__global__ void __launch_bounds__(kRouteWarps* kWarpLanes) moe_route_kernel(MoeRouteArgs args) {
  wait_for_previous();
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int num_experts = static_cast<int>(args.n_routed_experts),
            num_groups = static_cast<int>(args.n_group), group_experts = num_experts / num_groups,
            wanted = static_cast<int>(args.num_experts_per_tok);
  float* floats = dynamic_shared<float>() + warp * (2 * num_experts + num_groups);
  float* s = floats;
  float* choice = s + num_experts;
  float* group_score = choice + num_experts;
  uint8_t* taken = reinterpret_cast<uint8_t*>(dynamic_shared<float>() +
                                              kRouteWarps * (2 * num_experts + num_groups)) +
                   warp * (num_experts + num_groups);
  uint8_t* group_taken = taken + num_experts;

  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteWarps + warp;
  if (token >= args.num_tokens) return;
  const float* logits = args.logits + token * num_experts;
  for (int e = lane; e < num_experts; e += kWarpLanes) {
    // Through double, so that which of two close experts wins does not depend on the device.
    s[e] = 1.0f / (1.0f + static_cast<float>(exp(-static_cast<double>(logits[e]))));
    choice[e] = ranked(s[e] + (args.correction_bias != nullptr ? args.correction_bias[e] : 0.0f));
    taken[e] = num_groups > 1 ? 1 : 0;
  }
  __syncwarp();
  if (num_groups > 1) {
    for (int group = lane; group < num_groups; group += kWarpLanes) {
      float first = minus_infinity(), second = minus_infinity();
      for (int e = group * group_experts; e < (group + 1) * group_experts; ++e) {
        if (choice[e] > first) {
          second = first;
          first = choice[e];
        } else if (choice[e] > second) {
          second = choice[e];
        }
      }
      group_score[group] = ranked(first + second);
      group_taken[group] = 0;
    }
    __syncwarp();
    for (int i = 0; i < args.topk_group; ++i) {
      const int group = best_of(group_score, group_taken, num_groups);
      __syncwarp();
      if (lane == 0) group_taken[group] = 1;
      for (int e = lane; e < group_experts; e += kWarpLanes) taken[group * group_experts + e] = 0;
      __syncwarp();
    }
  }
  const int64_t row = token * (wanted + (args.shared_expert ? 1 : 0));
  int32_t* experts = args.experts + row;
  float* weights = args.expert_weights + row;
  float divisor = 1e-20f;
  for (int i = 0; i < wanted; ++i) {
    const int e = best_of(choice, taken, num_experts);
    __syncwarp();
    if (lane == 0) {
      taken[e] = 1;
      experts[i] = e;
    }
    divisor += s[e];
    __syncwarp();
  }
  if (args.shared_expert && lane == 0) {
    experts[wanted] = num_experts;
    weights[wanted] = 1;
  }
  if (!args.norm_topk_prob) divisor = 1;
  for (int i = lane; i < wanted; i += kWarpLanes)
    weights[i] = s[experts[i]] / divisor * args.routed_scaling_factor;
}

size_t shared_bytes(const MoeRouteArgs& args) {
  return static_cast<size_t>(kRouteWarps * (9 * args.n_routed_experts + 5 * args.n_group));
}

}  // namespace

bool moe_route_cuda_supported(const MoeRouteArgs& args) { return shared_bytes(args) <= 48 * 1024; }

void moe_route_cuda(Exec& exec, const MoeRouteArgs& args) {
  launch(moe_route_kernel, blocks_for(args.num_tokens, kRouteWarps), kRouteWarps * kWarpLanes,
         shared_bytes(args), exec.cuda(), args);
}

}  // namespace indexcache
