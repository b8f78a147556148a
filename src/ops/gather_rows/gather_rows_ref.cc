#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/gather_rows/gather_rows.h"

namespace indexcache {

void gather_rows_ref_rows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row_bytes = args.row_elements * dtype_bytes(args.dtype);
    const TensorView row{args.dtype, {args.row_elements}, args.table + args.ids[r] * row_bytes};
    for (int64_t i = 0; i < args.row_elements; ++i)
      args.y[r * args.row_elements + i] = element_as_f32(row, i);
  }
}

}  // namespace indexcache
