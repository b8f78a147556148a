// The meaning of the op: one (token, head) at a time, everything in double, nothing rounded on the
// way.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/kit/fp8_rows.h"
#include "ops/sparse_mla/sparse_mla_impl.h"

namespace indexcache {
namespace {

double element(const PagedRows& rows, const uint8_t* row, int64_t i) {
  if (rows.dtype == DType::kF8E4M3) return fp8_latent_element(rows, row, i);
  return rows.dtype == DType::kBF16 ? bf16_to_f32(reinterpret_cast<const uint16_t*>(row)[i])
                                    : reinterpret_cast<const float*>(row)[i];
}

void attend(const SparseMlaArgs& args, const SeqSpan& seq, int64_t token, int64_t head) {
  const int64_t n = args.counts[token];
  const int32_t* positions = args.positions + token * args.k;
  const float* q = args.q + (token * args.num_heads + head) * args.rows.row_elements;
  std::vector<double> weights(static_cast<size_t>(n));
  double highest = -std::numeric_limits<double>::infinity();
  for (int64_t s = 0; s < n; ++s) {
    const uint8_t* row = args.rows.row(seq.pages, positions[s]);
    double dot = 0;
    for (int64_t i = 0; i < args.rows.row_elements; ++i) dot += q[i] * element(args.rows, row, i);
    weights[s] = args.scale * dot;
    highest = std::max(highest, weights[s]);
  }
  double sum = 0;
  for (double& weight : weights) sum += weight = std::exp(weight - highest);
  std::vector<double> out(static_cast<size_t>(args.value_dim), 0.0);
  for (int64_t s = 0; s < n; ++s) {
    const uint8_t* row = args.rows.row(seq.pages, positions[s]);
    for (int64_t d = 0; d < args.value_dim; ++d) {
      out[d] += weights[s] / sum * element(args.rows, row, d);
    }
  }
  float* to = args.out + (token * args.num_heads + head) * args.value_dim;
  for (int64_t d = 0; d < args.value_dim; ++d) to[d] = static_cast<float>(out[d]);
}

}  // namespace

void sparse_mla_ref(Exec& exec, const SparseMlaArgs& args) {
  for (const SeqSpan& seq : args.seqs) {
    exec.pool.parallel_for(seq.num_tokens * args.num_heads, [&](int64_t item, int) {
      attend(args, seq, seq.token_begin + item / args.num_heads, item % args.num_heads);
    });
  }
}

}  // namespace indexcache
