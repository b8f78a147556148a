#include "ops/gather_rows/gather_rows.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 128;

// One block a row.
template <DType dtype>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRowsArgs args) {
  wait_for_previous();
  const int64_t from = args.ids[blockIdx.x] * args.row_elements;
  float* y = args.y + blockIdx.x * args.row_elements;
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads)
    y[i] = element_at<dtype>(args.table, from + i);
}

}  // namespace

void gather_rows_cuda(Exec& exec, const GatherRowsArgs& args) {
  if (args.num_rows == 0 || args.row_elements == 0) return;
  for_weight_dtype(args.dtype, [&]<DType dtype>() {
    launch(gather_rows_kernel<dtype>, blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(), args);
  });
}

}  // namespace indexcache
