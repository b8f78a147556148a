#include "ops/rms_norm/rms_norm.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, RmsNormArgs, rms_norm);

Cost rms_norm_cost(const RmsNormArgs& args) {
  const double n = static_cast<double>(args.num_rows * args.row_elements);
  return {4 * n, 8 * n};
}

}  // namespace

void rms_norm(Exec& exec, const RmsNormArgs& args) {
  CHECK_GE(args.ldx, args.row_elements);
  CHECK(args.y == nullptr || args.ldy >= args.row_elements);
  CHECK(args.y16 == nullptr || exec.device == Device::kCuda);
  CHECK(args.num_rows == 0 || args.y != nullptr || args.y16 != nullptr);
  run_op(exec, "rms_norm", kTable, args, rms_norm_cost(args));
}

}  // namespace indexcache
