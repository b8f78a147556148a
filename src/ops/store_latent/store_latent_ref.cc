#include <algorithm>
#include <cmath>

#include "ops/kit/store_row.h"
#include "ops/store_latent/store_latent.h"

namespace indexcache {

void store_latent_ref_rows(const StoreLatentArgs& args, int64_t begin, int64_t end, float* row) {
  const int64_t n = args.latent_dim, half = (args.rows.row_elements - n) / 2;
  for (const SeqSpan& seq : args.seqs) {
    const int64_t from = std::max(begin, seq.token_begin),
                  to = std::min(end, seq.token_begin + seq.num_tokens);
    for (int64_t t = from; t < to; ++t) {
      const float* x = args.x + t * args.ldx;
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
      const double scale = 1 / std::sqrt(sum / static_cast<double>(n) + args.eps);
      for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(x[i] * scale * args.weight[i]);
      for (int64_t j = 0; j < half; ++j) {
        const double a = x[n + 2 * j], b = x[n + 2 * j + 1];
        const double c = args.cos[t * half + j], s = args.sin[t * half + j];
        row[n + 2 * j] = static_cast<float>(a * c - b * s);
        row[n + 2 * j + 1] = static_cast<float>(a * s + b * c);
      }
      store_row(args.rows, seq.pages, seq.first_position + t - seq.token_begin, row);
    }
  }
}

}  // namespace indexcache
