#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/silu_mul/silu_mul.h"

namespace indexcache {

void silu_mul_ref_rows(const SiluMulArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin * args.row_elements; i < end * args.row_elements; ++i) {
    const double z = args.gate[i];
    const double silu = z < -700 ? 0.0 : z / (1 + std::exp(-z));
    args.y[i] = static_cast<float>(silu * args.up[i]);
  }
}

}  // namespace indexcache
