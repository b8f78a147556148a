#include "ops/kit/vec.h"
#include "ops/moe_combine/moe_combine.h"

namespace indexcache::INDEXCACHE_ISA {

void moe_combine_rows(const MoeCombineArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_elements, whole = n - n % kLanes;
  for (int64_t r = begin; r < end; ++r) {
    float* y = args.y + r * n;
    for (int64_t j = 0; j < args.num_slots; ++j) {
      const float weight = args.weights[r * args.num_slots + j];
      const float* row = args.rows + args.slots[r * args.num_slots + j] * n;
      const Vec weights = vec_set(weight);
      for (int64_t i = 0; i < whole; i += kLanes)
        vec_store(y + i, vec_fma(weights, vec_load(row + i), vec_load(y + i)));
      for (int64_t i = whole; i < n; ++i) y[i] += weight * row[i];
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
