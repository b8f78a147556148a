// Writes new rows into a paged cache, in the cache's type.
//
//   cache row of position first_position + i  =  x[token_begin + i, :]      for every span of
//   `seqs`
//
// bf16 rounds to nearest, ties to even (NaN stays NaN); int8 and e4m3 rows and their scales are as
// ops/kit/int8_rows.h and fp8_rows.h say. Pages of distinct sequences are distinct, and so are
// positions: rows are independent. Exact parity with ref. Cost: one row read and one written for
// each token.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"
#include "ops/kit/paged.h"

namespace indexcache {

struct StoreRowsArgs {
  const float* x = nullptr;  // [num_rows, rows.row_elements], row stride ldx
  int64_t ldx = 0;
  int64_t num_rows = 0;
  std::span<const SeqSpan> seqs;  // cover rows [0, num_rows) in order
  PagedRows rows;
  const SeqSpan* device_seqs = nullptr;  // on a GPU: `seqs` in its memory
};

void store_rows(Exec& exec, const StoreRowsArgs& args);

void store_rows_ref_rows(const StoreRowsArgs& args, int64_t begin, int64_t end);
void store_rows_cuda(Exec& exec, const StoreRowsArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void store_rows_rows(const StoreRowsArgs& args, int64_t begin,
                                                 int64_t end))

}  // namespace indexcache
