// The gate of SwiGLU: y[r, i] = silu(gate[r, i]) * up[r, i], silu(z) = z / (1 + exp(-z)).
//
// f32, dense rows; y may be `gate` or `up`. silu(-infinity) is 0 by its limit; NaN propagates.
// Tolerance against ref (double): 8 * 2^-24 relative, plus 2^-119 |up| where exp underflows: below
// -87.3 the gate counts as 0, and |z| exp(z) is at most 87.3 exp(-87.3) < 2^-119 there.
// Cost: about 10 flops and 3 elements an element.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"

namespace indexcache {

struct SiluMulArgs {
  const float* gate = nullptr;  // [num_rows, row_elements]
  const float* up = nullptr;    // [num_rows, row_elements]
  int64_t num_rows = 0;
  int64_t row_elements = 0;
  float* y = nullptr;  // [num_rows, row_elements]
};

void silu_mul(Exec& exec, const SiluMulArgs& args);

void silu_mul_ref_rows(const SiluMulArgs& args, int64_t begin, int64_t end);
void silu_mul_cuda(Exec& exec, const SiluMulArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void silu_mul_rows(const SiluMulArgs& args, int64_t begin, int64_t end))

}  // namespace indexcache
