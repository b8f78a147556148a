#include "ops/rms_norm/rms_norm.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 256;

// One block a row. Every element is read twice and written by one thread, so y may be x.
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormArgs args) {
  const float* x = args.x + blockIdx.x * args.ldx;
  float* y = args.y + blockIdx.x * args.ldy;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads) squares += x[i] * x[i];
  const float mean = block_sum(squares) / static_cast<float>(args.row_elements);
  const float scale = 1 / sqrtf(mean + args.eps);
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads)
    y[i] = x[i] * scale * args.weight[i];
}

}  // namespace

void rms_norm_cuda(Exec& exec, const RmsNormArgs& args) {
  if (args.num_rows == 0 || args.row_elements == 0) return;
  launch(rms_norm_kernel, blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
