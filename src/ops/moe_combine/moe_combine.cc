#include "ops/moe_combine/moe_combine.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, MoeCombineArgs, moe_combine);

Cost moe_combine_cost(const MoeCombineArgs& args) {
  const double n = static_cast<double>(args.num_rows * args.row_elements);
  const double slots = static_cast<double>(args.num_slots);
  return {2 * slots * n, n * ((args.rows16 != nullptr ? 2 : 4) * slots + 8)};
}

}  // namespace

void moe_combine(Exec& exec, const MoeCombineArgs& args) {
  CHECK(args.rows16 == nullptr || (exec.device == Device::kCuda && args.rows == nullptr));
  run_op(exec, "moe_combine", kTable, args, moe_combine_cost(args));
}

}  // namespace indexcache
