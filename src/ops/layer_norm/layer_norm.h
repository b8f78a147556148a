// Layer normalisation of rows, with bias: the indexer's k_norm (DeepSeek-V3.2 reference, eps 1e-6).
//
//   y[r, i] = (x[r, i] - mean) / sqrt(variance + eps) * weight[i] + bias[i]
//
// f32; variance is the biased one, computed from the centred values (two passes). In place allowed
// as for rms_norm. Tolerance against ref (double): (n + 8) 2^-24 (max |x| / sqrt(variance + eps)
// |weight| + |bias|), n = row_elements. Cost: 7 n flops and 2 n elements a row.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"

namespace indexcache {

struct LayerNormArgs {
  const float* x = nullptr;  // [num_rows, row_elements], row stride ldx
  int64_t ldx = 0;
  const float* weight = nullptr;  // [row_elements]
  const float* bias = nullptr;    // [row_elements]
  float eps = 0;
  int64_t num_rows = 0;
  int64_t row_elements = 0;
  float* y = nullptr;  // [num_rows, row_elements], row stride ldy
  int64_t ldy = 0;
};

void layer_norm(Exec& exec, const LayerNormArgs& args);

void layer_norm_ref_rows(const LayerNormArgs& args, int64_t begin, int64_t end);
void layer_norm_cuda(Exec& exec, const LayerNormArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void layer_norm_rows(const LayerNormArgs& args, int64_t begin,
                                                 int64_t end))

}  // namespace indexcache
