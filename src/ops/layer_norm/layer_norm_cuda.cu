#include "ops/layer_norm/layer_norm.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 128;

// One block a row.
__global__ void __launch_bounds__(kThreads) layer_norm_kernel(LayerNormArgs args) {
  const float* x = args.x + blockIdx.x * args.ldx;
  float* y = args.y + blockIdx.x * args.ldy;
  const float n = static_cast<float>(args.row_elements);
  float sum = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads) sum += x[i];
  const float mean = block_sum(sum) / n;
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads)
    squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / sqrtf(block_sum(squares) / n + args.eps);
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads)
    y[i] = (x[i] - mean) * scale * args.weight[i] + args.bias[i];
}

}  // namespace

void layer_norm_cuda(Exec& exec, const LayerNormArgs& args) {
  if (args.num_rows == 0 || args.row_elements == 0) return;
  launch(layer_norm_kernel, blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
