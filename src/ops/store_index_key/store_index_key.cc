#include "ops/store_index_key/store_index_key.h"

#include "ops/kit/cached_rows.h"

namespace indexcache {

namespace {

INDEXCACHE_CACHED_ROWS_TABLE(kTable, StoreIndexKeyArgs, store_index_key);

Cost store_index_key_cost(const StoreIndexKeyArgs& args) {
  const int64_t n = args.rows.row_elements;
  return {static_cast<double>(args.num_rows * (7 * n + 3 * args.rope_dim)),
          static_cast<double>(args.num_rows *
                              (4 * (n + args.rope_dim) + paged_row_bytes(args.rows.dtype, n)))};
}

}  // namespace

void store_index_key(Exec& exec, const StoreIndexKeyArgs& args) {
  CHECK(args.rows.dtype == DType::kF32 || args.rows.dtype == DType::kBF16 ||
        rows_have_scales(args.rows.dtype));
  CHECK_EQ(args.rows.fp8_elements, 0);
  if (rows_have_scales(args.rows.dtype)) CHECK_EQ(args.rows.page_bytes % 4, 0);
  CHECK_GE(args.rows.row_elements, 1);
  CHECK_GE(args.ldx, args.rows.row_elements);
  CHECK_EQ(args.rope_dim % 2, 0);
  CHECK_LE(args.rope_dim, args.rows.row_elements);
  run_op(exec, "store_index_key", kTable, args, store_index_key_cost(args));
}

}  // namespace indexcache
