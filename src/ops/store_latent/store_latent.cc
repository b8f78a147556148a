#include "ops/store_latent/store_latent.h"

#include "ops/kit/cached_rows.h"

namespace indexcache {

namespace {

INDEXCACHE_CACHED_ROWS_TABLE(kTable, StoreLatentArgs, store_latent);

Cost store_latent_cost(const StoreLatentArgs& args) {
  const int64_t n = args.rows.row_elements, rope_dim = n - args.latent_dim;
  return {static_cast<double>(args.num_rows * (4 * args.latent_dim + 3 * rope_dim)),
          static_cast<double>(args.num_rows * (4 * (n + rope_dim) + args.rows.row_bytes()))};
}

}  // namespace

void store_latent(Exec& exec, const StoreLatentArgs& args) {
  CHECK(args.rows.dtype == DType::kF32 || args.rows.dtype == DType::kBF16 ||
        args.rows.dtype == DType::kF8E4M3);
  CHECK_EQ(args.rows.fp8_elements, args.rows.dtype == DType::kF8E4M3 ? args.latent_dim : 0);
  CHECK_EQ(args.rows.fp8_elements % kFp8Block, 0);
  CHECK_GE(args.latent_dim, 1);
  CHECK_GE(args.rows.row_elements, args.latent_dim);
  CHECK_EQ((args.rows.row_elements - args.latent_dim) % 2, 0);
  CHECK_GE(args.ldx, args.rows.row_elements);
  run_op(exec, "store_latent", kTable, args, store_latent_cost(args));
}

}  // namespace indexcache
