#include "ops/kit/cuda.cuh"
#include "ops/token_nll/token_nll.h"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 256;

__device__ __forceinline__ double warp_sum_double(double value) {
  for (int bits = kWarpLanes / 2; bits > 0; bits /= 2)
    value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

// One block a row: its largest logit, then the sum, each thread's share in the order of the row.
__global__ void __launch_bounds__(kThreads) token_nll_kernel(TokenNllArgs args) {
  wait_for_previous();
  __shared__ float largest_of_warp[kWarpLanes];
  __shared__ double sum_of_warp[kWarpLanes];
  const float* row = args.logits + blockIdx.x * args.vocab_size;
  const unsigned lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  float top = minus_infinity();
  for (int64_t i = threadIdx.x; i < args.vocab_size; i += kThreads) top = fmaxf(top, row[i]);
  top = warp_max(top);
  if (lane == 0) largest_of_warp[warp] = top;
  __syncthreads();
  for (unsigned w = 0; w < kThreads / kWarpLanes; ++w) top = fmaxf(top, largest_of_warp[w]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < args.vocab_size; i += kThreads)
    sum += exp(static_cast<double>(row[i]) - static_cast<double>(top));
  sum = warp_sum_double(sum);
  if (lane == 0) sum_of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (unsigned w = 0; w < kThreads / kWarpLanes; ++w) sum += sum_of_warp[w];
  args.nll[blockIdx.x] =
      log(sum) + static_cast<double>(top) - static_cast<double>(row[args.targets[blockIdx.x]]);
}

}  // namespace

void token_nll_cuda(Exec& exec, const TokenNllArgs& args) {
  if (args.num_rows == 0) return;
  launch(token_nll_kernel, blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
