#include "ops/kit/vec.h"
#include "ops/layer_norm/layer_norm.h"

namespace indexcache::INDEXCACHE_ISA {

void layer_norm_rows(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_elements, whole = n - n % kLanes;
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.ldx;
    float* y = args.y + r * args.ldy;
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
    for (int64_t i = whole; i < n; ++i)
      y[i] = (x[i] - mean) * scale * args.weight[i] + args.bias[i];
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
