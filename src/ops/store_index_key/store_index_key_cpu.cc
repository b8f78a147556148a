#include "ops/kit/vec_rows.h"
#include "ops/store_index_key/store_index_key.h"

namespace indexcache::INDEXCACHE_ISA {

namespace {

INDEXCACHE_INLINE void vec_layer_norm_row(const float* x, const StoreIndexKeyArgs& args, float* y) {
  const int64_t n = args.rows.row_elements, whole = n - n % kLanes;
  Vec sums = vec_zero();
  for (int64_t i = 0; i < whole; i += kLanes) sums = vec_add(sums, vec_load(x + i));
  float sum = vec_sum(sums);
  for (int64_t i = whole; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);
  const Vec means = vec_set(mean);
  sums = vec_zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec centred = vec_sub(vec_load(x + i), means);
    sums = vec_fma(centred, centred, sums);
  }
  float squares = vec_sum(sums);
  for (int64_t i = whole; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / __builtin_sqrtf(squares / static_cast<float>(n) + args.eps);
  const Vec scales = vec_set(scale);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec normal = vec_mul(vec_sub(vec_load(x + i), means), scales);
    vec_store(y + i, vec_fma(normal, vec_load(args.weight + i), vec_load(args.bias + i)));
  }
  for (int64_t i = whole; i < n; ++i) y[i] = (x[i] - mean) * scale * args.weight[i] + args.bias[i];
}

}  // namespace

void store_index_key_rows(const StoreIndexKeyArgs& args, int64_t begin, int64_t end, float* row) {
  const int64_t half = args.rope_dim / 2;
  for (size_t s = 0; s < args.seqs.size(); ++s) {
    const SeqSpan seq = args.seqs.data()[s];
    int64_t from = seq.token_begin, to = seq.token_begin + seq.num_tokens;
    if (from < begin) from = begin;
    if (to > end) to = end;
    for (int64_t t = from; t < to; ++t) {
      vec_layer_norm_row(args.x + t * args.ldx, args, row);
      vec_rotate_row(row, args.cos + t * half, args.sin + t * half, half, args.interleaved, row);
      vec_store_row(args.rows, seq.pages, seq.first_position + t - seq.token_begin, row);
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
