// Root-mean-square normalisation of rows.
//
//   y[r, i] = x[r, i] / sqrt(mean_i x[r, i]^2 + eps) * weight[i]
//
// f32. x and y may be the same rows (same pointer and stride), or must not overlap. A row of zeros
// gives zeros; NaN and infinity stay within their row. Tolerance against ref (double): (n + 8)
// 2^-24 relative, n = row_elements. Cost: 4 n flops and 2 n elements a row.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"

namespace indexcache {

struct RmsNormArgs {
  const float* x = nullptr;  // [num_rows, row_elements], row stride ldx
  int64_t ldx = 0;
  const float* weight = nullptr;  // [row_elements]
  float eps = 0;
  int64_t num_rows = 0;
  int64_t row_elements = 0;
  float* y = nullptr;  // [num_rows, row_elements], row stride ldy
  int64_t ldy = 0;
  // On a GPU: the same rounded to bf16, [num_rows, row_elements], for the products that follow. y
  // may then be null.
  uint16_t* y16 = nullptr;
};

void rms_norm(Exec& exec, const RmsNormArgs& args);

void rms_norm_ref_rows(const RmsNormArgs& args, int64_t begin, int64_t end);
void rms_norm_cuda(Exec& exec, const RmsNormArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end))

}  // namespace indexcache
