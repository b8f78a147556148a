#include "ops/moe_combine/moe_combine.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 128;

// One block a row.
__global__ void __launch_bounds__(kThreads) moe_combine_kernel(MoeCombineArgs args) {
  wait_for_previous();
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads) {
    float sum = args.y[row * args.row_elements + i];
    for (int64_t j = 0; j < args.num_slots; ++j) {
      const int64_t slot = args.slots[row * args.num_slots + j];
      sum += args.weights[row * args.num_slots + j] * args.rows[slot * args.row_elements + i];
    }
    args.y[row * args.row_elements + i] = sum;
  }
}

// The same for aligned rows in bf16, 8 elements a thread.
__global__ void __launch_bounds__(kThreads) moe_combine_bf16_kernel(MoeCombineArgs args) {
  wait_for_previous();
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x * 8; i < args.row_elements; i += kThreads * 8) {
    float4* y = reinterpret_cast<float4*>(args.y + row * args.row_elements + i);
    const float4 low = y[0], high = y[1];
    float sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int64_t j = 0; j < args.num_slots; ++j) {
      const int64_t slot = args.slots[row * args.num_slots + j];
      const float weight = args.weights[row * args.num_slots + j];
      const uint4 bits =
          *reinterpret_cast<const uint4*>(args.rows16 + slot * args.row_elements + i);
      const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        sums[2 * p] += weight * bf16_bits_to_f32(pairs[p] & 0xFFFFu);
        sums[2 * p + 1] += weight * bf16_bits_to_f32(pairs[p] >> 16);
      }
    }
    y[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    y[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
}

}  // namespace

void moe_combine_cuda(Exec& exec, const MoeCombineArgs& args) {
  if (args.num_rows == 0 || args.row_elements == 0) return;
  if (args.rows16 != nullptr) {
    CHECK_EQ(args.row_elements % 8, 0);
    CHECK_EQ(reinterpret_cast<uintptr_t>(args.y) % 16, uintptr_t{0});
  }
  launch(args.rows16 != nullptr ? moe_combine_bf16_kernel : moe_combine_kernel,
         blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
