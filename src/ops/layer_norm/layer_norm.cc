#include "ops/layer_norm/layer_norm.h"

#include "ops/kit/rows.h"

namespace indexcache {

namespace {

INDEXCACHE_ROWS_TABLE(kTable, LayerNormArgs, layer_norm);

Cost layer_norm_cost(const LayerNormArgs& args) {
  const double n = static_cast<double>(args.num_rows * args.row_elements);
  return {7 * n, 8 * n};
}

}  // namespace

void layer_norm(Exec& exec, const LayerNormArgs& args) {
  CHECK_GE(args.ldx, args.row_elements);
  CHECK_GE(args.ldy, args.row_elements);
  run_op(exec, "layer_norm", kTable, args, layer_norm_cost(args));
}

}  // namespace indexcache
