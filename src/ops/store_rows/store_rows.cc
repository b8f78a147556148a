#include "ops/store_rows/store_rows.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, StoreRowsArgs, store_rows);

Cost store_rows_cost(const StoreRowsArgs& args) {
  const int64_t elements = args.rows.row_elements;
  return {0, static_cast<double>(args.num_rows *
                                 (4 * elements + paged_row_bytes(args.rows.dtype, elements)))};
}

}  // namespace

void store_rows(Exec& exec, const StoreRowsArgs& args) {
  CHECK(args.rows.dtype == DType::kF32 || args.rows.dtype == DType::kBF16 ||
        rows_have_scales(args.rows.dtype));
  if (rows_have_scales(args.rows.dtype)) CHECK_EQ(args.rows.page_bytes % 4, 0);
  CHECK_GE(args.ldx, args.rows.row_elements);
  run_op(exec, "store_rows", kTable, args, store_rows_cost(args));
}

}  // namespace indexcache
