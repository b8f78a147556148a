#include "ops/kit/vec.h"
#include "ops/silu_mul/silu_mul.h"

namespace indexcache::INDEXCACHE_ISA {

namespace {

// sigmoid(z) from e = exp(-|z|), which cannot overflow: 1 / (1 + e) for z >= 0, e / (1 + e) below.
INDEXCACHE_INLINE Vec silu(Vec z) {
  const Vec e = vec_exp(vec_min(z, vec_sub(vec_zero(), z)));
  const Vec sigmoid = vec_div(vec_select_negative(z, e, vec_set(1.0f)), vec_add(vec_set(1.0f), e));
  return vec_mul(vec_max(vec_set(-3e38f), z),
                 sigmoid);  // -infinity times 0 would be NaN; NaN passes
}

}  // namespace

void silu_mul_rows(const SiluMulArgs& args, int64_t begin, int64_t end) {
  const int64_t first = begin * args.row_elements, last = end * args.row_elements;
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    vec_store(args.y + i, vec_mul(silu(vec_load(args.gate + i)), vec_load(args.up + i)));
  }
  if (i == last) return;
  float gate[kLanes] = {}, up[kLanes] = {}, y[kLanes];
  for (int64_t j = i; j < last; ++j) {
    gate[j - i] = args.gate[j];
    up[j - i] = args.up[j];
  }
  vec_store(y, vec_mul(silu(vec_load(gate)), vec_load(up)));
  for (int64_t j = i; j < last; ++j) args.y[j] = y[j - i];
}

}  // namespace indexcache::INDEXCACHE_ISA
