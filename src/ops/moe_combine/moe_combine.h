// Adds the routed experts' outputs to the residual stream.
//
//   y[r, :] += sum_j weights[r, j] * rows[slots[r, j], :]        j in order, so the result is
//   deterministic
//
// f32; on a GPU rows may be bf16, 16-byte aligned and a multiple of 8 elements. Slots are row
// numbers of the grouped expert output; no slot is used twice. NaN propagates. Tolerance against
// ref (double): (num_slots + 2) 2^-24 (|y| + sum_j |w rows|). Cost: 2 num_slots flops an element.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"

namespace indexcache {

struct MoeCombineArgs {
  const float* rows = nullptr;     // [*, row_elements]
  const int32_t* slots = nullptr;  // [num_rows, num_slots]
  const float* weights = nullptr;  // [num_rows, num_slots]
  int64_t num_slots = 0;           // num_experts_per_tok
  int64_t num_rows = 0;
  int64_t row_elements = 0;
  float* y = nullptr;                // [num_rows, row_elements]
  const uint16_t* rows16 = nullptr;  // on a GPU: rows in bf16, in their place
};

void moe_combine(Exec& exec, const MoeCombineArgs& args);

void moe_combine_ref_rows(const MoeCombineArgs& args, int64_t begin, int64_t end);
void moe_combine_cuda(Exec& exec, const MoeCombineArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void moe_combine_rows(const MoeCombineArgs& args, int64_t begin,
                                                  int64_t end))

}  // namespace indexcache
