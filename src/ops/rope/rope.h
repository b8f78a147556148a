// Rotary position embedding of the first `rope_dim` elements of every head of a row.
//
//   interleaved:  (y[2j], y[2j+1])        = rotate(x[2j], x[2j+1], angle[j])
//   half-split:   (y[j], y[j + rope_dim/2]) = rotate(x[j], x[j + rope_dim/2], angle[j])
//   rotate(a, b, t) = (a cos t - b sin t, a sin t + b cos t)
//
// MLA is interleaved in both families; the indexer is interleaved in GLM-MoE-DSA and half-split in
// DeepSeek-V3.2 (config's indexer_rope_interleave). f32; y may be x (same pointer and strides).
// Exactly 4 products and 2 sums an output pair, so parity with ref is 4 * 2^-24 (|a| + |b|). Cost:
// 6 flops and 2 elements for each pair element.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"

namespace indexcache {

struct RopeArgs {
  const float* x = nullptr;  // head h of row r begins at x + r * ldx + h * head_stride
  int64_t ldx = 0;
  int64_t x_head_stride = 0;
  int64_t num_rows = 0;
  int64_t num_heads = 0;
  int64_t rope_dim = 0;  // even
  bool interleaved = true;
  const float* cos = nullptr;  // [num_rows, rope_dim / 2]
  const float* sin = nullptr;  // [num_rows, rope_dim / 2]
  float* y = nullptr;
  int64_t ldy = 0;
  int64_t y_head_stride = 0;
  const uint16_t* x16 = nullptr;  // on a GPU: x in bf16, in its place
};

void rope(Exec& exec, const RopeArgs& args);

void rope_ref_rows(const RopeArgs& args, int64_t begin, int64_t end);
void rope_cuda(Exec& exec, const RopeArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void rope_rows(const RopeArgs& args, int64_t begin, int64_t end))

}  // namespace indexcache
