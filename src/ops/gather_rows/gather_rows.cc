#include "ops/gather_rows/gather_rows.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, GatherRowsArgs, gather_rows);

Cost gather_rows_cost(const GatherRowsArgs& args) {
  const double n = static_cast<double>(args.num_rows * args.row_elements);
  return {0, n * (4 + dtype_bytes(args.dtype))};
}

}  // namespace

void gather_rows(Exec& exec, const GatherRowsArgs& args) {
  if (exec.device == Device::kCpu) {  // ids in GPU memory were checked where they were made
    for (int64_t r = 0; r < args.num_rows; ++r) {
      CHECK_GE(args.ids[r], 0);
      CHECK_LT(args.ids[r], args.table_rows);
    }
  }
  run_op(exec, "gather_rows", kTable, args, gather_rows_cost(args));
}

}  // namespace indexcache
