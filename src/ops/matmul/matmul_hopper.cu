// matmul with Compute::kFP8 on Hopper, as a line of the op's table: rows become e4m3 once for all
// matrices that take them, and a product of many rows runs at the rate of fp8.
#include <vector>

#include "device/cuda.cuh"
#include "device/gpus.h"
#include "ops/kit/grouped_products_sm90.cuh"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {

namespace {

bool is_aligned(const void* data, int64_t row_bytes, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         static_cast<uintptr_t>(row_bytes) % bytes == 0;
}

bool is_for_hopper(const MatmulGroup& group, Compute compute) {
  const Weight& w = group.w;
  return compute_for(compute, w.dtype) == Compute::kFP8 && group.m > kFewRows && w.cols > 0 &&
         w.rows % 8 == 0 && is_aligned(w.data, w.cols, 16) &&
         (group.x16 != nullptr ? is_aligned(group.x16, 2 * group.ldx, 8)
                               : is_aligned(group.x, 4 * group.ldx, 16)) &&
         (group.y16 != nullptr ? is_aligned(group.y16, 2 * group.ldy, 8)
                               : is_aligned(group.y, 4 * group.ldy, 8));
}

bool same_rows(const MatmulGroup& a, const MatmulGroup& b) {
  return a.x == b.x && a.x16 == b.x16 && a.ldx == b.ldx && a.m == b.m && a.w.cols == b.w.cols;
}

}  // namespace

bool matmul_fp8_hopper_supported(const MatmulArgs& args) {
  if (args.compute != Compute::kFP8 || !first_gpu_is_hopper()) return false;
  for (const MatmulGroup& group : args.groups) {
    if (is_for_hopper(group, args.compute)) return true;
  }
  return false;
}

void matmul_fp8_hopper(Exec& exec, const MatmulArgs& args) {
  CudaStream& stream = exec.cuda();
  std::vector<MatmulGroup> others;
  const MatmulGroup* quantised = nullptr;
  sm90::QuantiseRows rows;
  for (const MatmulGroup& group : args.groups) {
    if (!is_for_hopper(group, args.compute)) {
      others.push_back(group);
      continue;
    }
    const int64_t k = group.w.cols;
    if (quantised == nullptr || !same_rows(*quantised, group)) {
      rows = {.x = group.x, .x16 = group.x16, .ldx = group.ldx, .num_rows = group.m, .k = k};
      sm90::place_quantised(stream.scratch(sm90::quantised_bytes(group.m, k)), &rows);
      check_cuda(sm90::quantise_rows(rows, stream_of(stream)), "rounding rows to fp8");
      quantised = &group;
    }
    sm90::GroupedProducts p;
    p.x = rows.values;
    p.x_scales = rows.scales;
    p.num_rows = group.m;
    p.n = group.w.rows;
    p.k = k;
    p.w = {group.w.data, 16, group.w.scale_inv, 0};
    p.y16 = group.y16;
    p.y = group.y;
    p.ldy = group.ldy;
    p.accumulate = args.accumulate;
    check_cuda(sm90::grouped_products(p, stream.num_multiprocessors(), stream_of(stream)),
               "an fp8 product");
  }
  if (others.empty()) return;
  const MatmulArgs rest{others, args.compute, args.accumulate, args.batch_invariant};
  matmul_cublaslt_supported(rest) ? matmul_cublaslt(exec, rest) : matmul_cuda(exec, rest);
}

}  // namespace indexcache
