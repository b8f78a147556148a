#include <algorithm>
#include <limits>
#include <vector>

#include "ops/index_select/index_select.h"
#include "ops/kit/fp8_rows.h"
#include "ops/kit/int8_rows.h"

namespace indexcache {

namespace {

// NaN, unlike a negative number, passes: a NaN product must reach the score.
double relu(double x) { return x <= 0 ? 0 : x; }

// The rows of one token's q and its weights, in the precision that goes with the keys.
struct Query {
  std::vector<float> q, weights;
};

Query query_of(const IndexSelectArgs& args, int64_t token) {
  const int64_t heads = args.num_heads, dim = args.head_dim;
  const float* q = args.q + token * heads * dim;
  const float* weights = args.weights + token * heads;
  Query query = {{q, q + heads * dim}, {weights, weights + heads}};
  if (args.keys.dtype == DType::kBF16) {
    for (float& x : query.q) x = bf16_to_f32(f32_to_bf16(x));
  } else if (args.keys.dtype == DType::kI8) {
    std::vector<int8_t> integers(static_cast<size_t>(dim));
    for (int64_t h = 0; h < heads; ++h) {
      query.weights[static_cast<size_t>(h)] *= quantise_row(q + h * dim, dim, integers.data());
      std::copy(integers.begin(), integers.end(), query.q.begin() + h * dim);
    }
  } else if (args.keys.dtype == DType::kF8E4M3) {
    std::vector<uint8_t> bits(static_cast<size_t>(dim));
    for (int64_t h = 0; h < heads; ++h) {
      query.weights[static_cast<size_t>(h)] *= quantise_fp8_row(q + h * dim, dim, bits.data());
      std::transform(bits.begin(), bits.end(), query.q.begin() + h * dim, f8e4m3_to_f32);
    }
  }
  return query;
}

double key_element(const IndexSelectArgs& args, const uint8_t* row, int64_t d) {
  if (args.keys.dtype == DType::kI8) return reinterpret_cast<const int8_t*>(row)[d];
  if (args.keys.dtype == DType::kF8E4M3) return f8e4m3_to_f32(row[d]);
  if (args.keys.dtype == DType::kBF16)
    return bf16_to_f32(reinterpret_cast<const uint16_t*>(row)[d]);
  return reinterpret_cast<const float*>(row)[d];
}

double score(const IndexSelectArgs& args, const SeqSpan& seq, const Query& query,
             int64_t position) {
  const uint8_t* row = args.keys.row(seq.pages, position);
  double sum = 0;
  for (int64_t h = 0; h < args.num_heads; ++h) {
    const float* q = query.q.data() + h * args.head_dim;
    double dot = 0;
    for (int64_t d = 0; d < args.head_dim; ++d) {
      dot += static_cast<double>(q[d]) * key_element(args, row, d);
    }
    sum += static_cast<double>(query.weights[static_cast<size_t>(h)]) * relu(dot);
  }
  if (rows_have_scales(args.keys.dtype)) sum *= *args.keys.scale(seq.pages, position);
  return sum == sum ? sum : -std::numeric_limits<double>::infinity();
}

void select(const IndexSelectArgs& args, const SeqSpan& seq, int64_t token) {
  const int64_t visible = seq.first_position + (token - seq.token_begin) + 1;
  const int64_t count = std::min(args.k, visible);
  std::vector<int32_t> order(static_cast<size_t>(visible));
  for (int64_t s = 0; s < visible; ++s) order[static_cast<size_t>(s)] = static_cast<int32_t>(s);
  if (count < visible) {
    std::vector<double> scores(static_cast<size_t>(visible));
    const Query query = query_of(args, token);
    for (int64_t s = 0; s < visible; ++s) {
      scores[static_cast<size_t>(s)] = score(args, seq, query, s);
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
