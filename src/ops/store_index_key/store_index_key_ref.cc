#include <algorithm>
#include <cmath>

#include "ops/kit/store_row.h"
#include "ops/store_index_key/store_index_key.h"

namespace indexcache {

void store_index_key_ref_rows(const StoreIndexKeyArgs& args, int64_t begin, int64_t end,
                              float* row) {
  const int64_t n = args.rows.row_elements, half = args.rope_dim / 2;
  for (const SeqSpan& seq : args.seqs) {
    const int64_t from = std::max(begin, seq.token_begin),
                  to = std::min(end, seq.token_begin + seq.num_tokens);
    for (int64_t t = from; t < to; ++t) {
      const float* x = args.x + t * args.ldx;
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < n; ++i) sum += x[i];
      const double mean = sum / static_cast<double>(n);
      for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
      const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + args.eps);
      const auto normed = [&](int64_t i) {
        return (x[i] - mean) * scale * args.weight[i] + args.bias[i];
      };
      for (int64_t i = args.rope_dim; i < n; ++i) row[i] = static_cast<float>(normed(i));
      for (int64_t j = 0; j < half; ++j) {
        const int64_t first = args.interleaved ? 2 * j : j,
                      second = args.interleaved ? 2 * j + 1 : j + half;
        const double a = normed(first), b = normed(second);
        const double c = args.cos[t * half + j], s = args.sin[t * half + j];
        row[first] = static_cast<float>(a * c - b * s);
        row[second] = static_cast<float>(a * s + b * c);
      }
      store_row(args.rows, seq.pages, seq.first_position + t - seq.token_begin, row);
    }
  }
}

}  // namespace indexcache
