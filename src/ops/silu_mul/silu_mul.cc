#include "ops/silu_mul/silu_mul.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, SiluMulArgs, silu_mul);

Cost silu_mul_cost(const SiluMulArgs& args) {
  const double n = static_cast<double>(args.num_rows * args.row_elements);
  return {10 * n, 12 * n};
}

}  // namespace

void silu_mul(Exec& exec, const SiluMulArgs& args) {
  run_op(exec, "silu_mul", kTable, args, silu_mul_cost(args));
}

}  // namespace indexcache
