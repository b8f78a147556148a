#include "ops/kit/vec_rows.h"
#include "ops/store_latent/store_latent.h"

namespace indexcache::INDEXCACHE_ISA {

void store_latent_rows(const StoreLatentArgs& args, int64_t begin, int64_t end, float* row) {
  const int64_t n = args.latent_dim, half = (args.rows.row_elements - n) / 2;
  for (size_t s = 0; s < args.seqs.size(); ++s) {
    const SeqSpan seq = args.seqs.data()[s];
    int64_t from = seq.token_begin, to = seq.token_begin + seq.num_tokens;
    if (from < begin) from = begin;
    if (to > end) to = end;
    for (int64_t t = from; t < to; ++t) {
      const float* x = args.x + t * args.ldx;
      vec_rms_norm_row(x, args.weight, args.eps, n, row);
      vec_rotate_row(x + n, args.cos + t * half, args.sin + t * half, half, true, row + n);
      vec_store_row(args.rows, seq.pages, seq.first_position + t - seq.token_begin, row);
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
