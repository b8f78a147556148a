#include "ops/kit/vec.h"
#include "ops/rms_norm/rms_norm.h"

namespace indexcache::INDEXCACHE_ISA {

void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_elements, whole = n - n % kLanes;
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.ldx;
    float* y = args.y + r * args.ldy;
    Vec sums = vec_zero();
    for (int64_t i = 0; i < whole; i += kLanes)
      sums = vec_fma(vec_load(x + i), vec_load(x + i), sums);
    float sum = vec_sum(sums);
    for (int64_t i = whole; i < n; ++i) sum += x[i] * x[i];
    const float scale = 1 / __builtin_sqrtf(sum / static_cast<float>(n) + args.eps);
    const Vec scales = vec_set(scale);
    for (int64_t i = 0; i < whole; i += kLanes) {
      vec_store(y + i, vec_mul(vec_mul(vec_load(x + i), scales), vec_load(args.weight + i)));
    }
    for (int64_t i = whole; i < n; ++i) y[i] = x[i] * scale * args.weight[i];
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
