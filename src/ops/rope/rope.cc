#include "ops/rope/rope.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, RopeArgs, rope);

Cost rope_cost(const RopeArgs& args) {
  const double n = static_cast<double>(args.num_rows * args.num_heads * args.rope_dim);
  return {3 * n, 8 * n};
}

}  // namespace

void rope(Exec& exec, const RopeArgs& args) {
  CHECK_EQ(args.rope_dim % 2, 0);
  CHECK(args.x16 == nullptr || (exec.device == Device::kCuda && args.x == nullptr));
  run_op(exec, "rope", kTable, args, rope_cost(args));
}

}  // namespace indexcache
