#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/layer_norm/layer_norm.h"

namespace indexcache {

void layer_norm_ref_rows(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const double n = static_cast<double>(args.row_elements);
  for (int64_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.ldx;
    float* y = args.y + r * args.ldy;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < args.row_elements; ++i) sum += x[i];
    const double mean = sum / n;
    for (int64_t i = 0; i < args.row_elements; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / std::sqrt(squares / n + args.eps);
    for (int64_t i = 0; i < args.row_elements; ++i) {
      y[i] = static_cast<float>((x[i] - mean) * scale * args.weight[i] + args.bias[i]);
    }
  }
}

}  // namespace indexcache
