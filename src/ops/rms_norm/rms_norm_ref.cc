#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/rms_norm/rms_norm.h"

namespace indexcache {

void rms_norm_ref_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.ldx;
    float* y = args.y + r * args.ldy;
    double sum = 0;
    for (int64_t i = 0; i < args.row_elements; ++i) sum += static_cast<double>(x[i]) * x[i];
    const double scale = 1 / std::sqrt(sum / static_cast<double>(args.row_elements) + args.eps);
    for (int64_t i = 0; i < args.row_elements; ++i)
      y[i] = static_cast<float>(x[i] * scale * args.weight[i]);
  }
}

}  // namespace indexcache
