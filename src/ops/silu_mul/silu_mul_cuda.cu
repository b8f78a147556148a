#include "ops/silu_mul/silu_mul.h"

#include "ops/kit/silu.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads) silu_mul_kernel(SiluMulArgs args) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.num_rows * args.row_elements) return;
  args.y[i] = silu(args.gate[i]) * args.up[i];
}

}  // namespace

void silu_mul_cuda(Exec& exec, const SiluMulArgs& args) {
  const int64_t count = args.num_rows * args.row_elements;
  if (count == 0) return;
  launch(silu_mul_kernel, blocks_for(count, kThreads), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
