#include "ops/moe_combine/moe_combine.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 128;

// One block a row.
__global__ void __launch_bounds__(kThreads) moe_combine_kernel(MoeCombineArgs args) {
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

}  // namespace

void moe_combine_cuda(Exec& exec, const MoeCombineArgs& args) {
  if (args.num_rows == 0 || args.row_elements == 0) return;
  launch(moe_combine_kernel, blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
