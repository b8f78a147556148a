// Rows of a table by number, as float32: the embedding of tokens, and the tokens that go to an
// expert.
//
//   y[r, :] = float32(table[ids[r], :])
//
// The table may be f32, f16, bf16, or fp8 e4m3 without block scales; conversion is exact. ids[r] is
// in [0, table_rows). Cost: no flops; one row read and one written for each id.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"
#include "tensor/tensor.h"

namespace indexcache {

struct GatherRowsArgs {
  DType dtype = DType::kF32;
  const uint8_t* table = nullptr;  // [table_rows, row_elements]; may be unaligned
  int64_t table_rows = 0;
  int64_t row_elements = 0;
  const int32_t* ids = nullptr;  // [num_rows]
  int64_t num_rows = 0;
  float* y = nullptr;  // [num_rows, row_elements]
};

void gather_rows(Exec& exec, const GatherRowsArgs& args);

void gather_rows_ref_rows(const GatherRowsArgs& args, int64_t begin, int64_t end);
void gather_rows_cuda(Exec& exec, const GatherRowsArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void gather_rows_rows(const GatherRowsArgs& args, int64_t begin,
                                                  int64_t end))

}  // namespace indexcache
