// The end of the ops that fill a paged cache: one row in the cache's type.
//
// bf16 rounds to nearest, ties to even (NaN stays NaN); int8 and e4m3 rows and their scales are as
// ops/kit/int8_rows.h and fp8_rows.h say, latent rows in fp8 as ops/kit/paged.h says. Files that
// are compiled once per instruction set use ops/kit/vec_rows.h, which does the same bit for bit.
#pragma once

#include "ops/kit/paged.h"

namespace indexcache {

void store_row(const PagedRows& rows, const int32_t* pages, int64_t position, const float* x);

}  // namespace indexcache
