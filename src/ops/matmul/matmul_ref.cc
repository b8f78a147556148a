// The meaning of matmul: obvious loops, accumulated in double.
#include <algorithm>
#include <vector>

#include "base/checked.h"
#include "ops/kit/fp8_rows.h"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {

namespace {

float weight_element(const TensorView& view, const float* scale_inv, int64_t row, int64_t col) {
  const int64_t num_cols = view.shape[1];
  const float value = element_as_f32(view, row * num_cols + col);
  if (view.dtype != DType::kF8E4M3) return value;
  return value * scale_inv[row / kScaleBlock * ceil_div(num_cols, kScaleBlock) + col / kScaleBlock];
}

float rounded(float value, Compute compute) {
  return compute == Compute::kBF16 ? bf16_to_f32(f32_to_bf16(value)) : value;
}

}  // namespace

void matmul_ref(Exec& exec, const MatmulArgs& args) {
  for (const MatmulGroup& group : args.groups) {
    if (group.m == 0) continue;
    const int64_t k = group.w.cols;
    const TensorView w = {group.w.dtype, {group.w.rows, k}, group.w.data};
    const Compute compute = compute_for(args.compute, w.dtype);
    std::vector<float> x(static_cast<size_t>(group.m * k));
    for (int64_t m = 0; m < group.m; ++m) {
      for (int64_t i = 0; i < k; ++i) {
        x[static_cast<size_t>(m * k + i)] = rounded(group.x[m * group.ldx + i], compute);
      }
      if (compute == Compute::kFP8) round_to_fp8_blocks(x.data() + m * k, k);
    }
    exec.pool.parallel_for(group.w.rows, [&](int64_t n, int) {
      std::vector<float> row(static_cast<size_t>(k));
      for (int64_t i = 0; i < k; ++i) {
        row[static_cast<size_t>(i)] = rounded(weight_element(w, group.w.scale_inv, n, i), compute);
      }
      for (int64_t m = 0; m < group.m; ++m) {
        float& y = group.y[m * group.ldy + n];
        double sum = args.accumulate ? y : 0;
        for (int64_t i = 0; i < k; ++i) {
          sum +=
              static_cast<double>(x[static_cast<size_t>(m * k + i)]) * row[static_cast<size_t>(i)];
        }
        y = static_cast<float>(sum);
      }
    });
  }
}

}  // namespace indexcache
