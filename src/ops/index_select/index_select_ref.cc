#include <algorithm>
#include <limits>
#include <vector>

#include "ops/index_select/index_select.h"

namespace indexcache {

namespace {

// NaN, unlike a negative number, passes: a NaN product must reach the score.
double relu(double x) { return x <= 0 ? 0 : x; }

double score(const IndexSelectArgs& args, const SeqSpan& seq, int64_t token, int64_t position) {
  const uint8_t* row = args.keys.row(seq.pages, position);
  const bool bf16 = args.keys.dtype == DType::kBF16;
  double sum = 0;
  for (int64_t h = 0; h < args.num_heads; ++h) {
    const float* q = args.q + (token * args.num_heads + h) * args.head_dim;
    double dot = 0;
    for (int64_t d = 0; d < args.head_dim; ++d) {
      dot += bf16 ? static_cast<double>(bf16_to_f32(f32_to_bf16(q[d]))) *
                        bf16_to_f32(reinterpret_cast<const uint16_t*>(row)[d])
                  : static_cast<double>(q[d]) * reinterpret_cast<const float*>(row)[d];
    }
    sum += static_cast<double>(args.weights[token * args.num_heads + h]) * relu(dot);
  }
  return sum == sum ? sum : -std::numeric_limits<double>::infinity();
}

void select(const IndexSelectArgs& args, const SeqSpan& seq, int64_t token) {
  const int64_t visible = seq.first_position + (token - seq.token_begin) + 1;
  const int64_t count = std::min(args.k, visible);
  std::vector<int32_t> order(static_cast<size_t>(visible));
  for (int64_t s = 0; s < visible; ++s) order[static_cast<size_t>(s)] = static_cast<int32_t>(s);
  if (count < visible) {
    std::vector<double> scores(static_cast<size_t>(visible));
    for (int64_t s = 0; s < visible; ++s) {
      scores[static_cast<size_t>(s)] = score(args, seq, token, s);
    }
    std::nth_element(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
      const double x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
      return x != y ? x > y : a < b;
    });
    std::sort(order.begin(), order.begin() + count);
  }
  int32_t* out = args.positions + token * args.k;
  std::copy_n(order.begin(), count, out);
  std::fill(out + count, out + args.k, -1);
  args.counts[token] = static_cast<int32_t>(count);
}

}  // namespace

void index_select_ref(Exec& exec, const IndexSelectArgs& args) {
  for (const SeqSpan& seq : args.seqs) {
    exec.pool.parallel_for(seq.num_tokens,
                           [&](int64_t i, int) { select(args, seq, seq.token_begin + i); });
  }
}

}  // namespace indexcache
