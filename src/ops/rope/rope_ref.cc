#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/rope/rope.h"

namespace indexcache {

void rope_ref_rows(const RopeArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.rope_dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t h = 0; h < args.num_heads; ++h) {
      const float* x = args.x + r * args.ldx + h * args.x_head_stride;
      float* y = args.y + r * args.ldy + h * args.y_head_stride;
      for (int64_t j = 0; j < half; ++j) {
        const int64_t first = args.interleaved ? 2 * j : j;
        const int64_t second = args.interleaved ? 2 * j + 1 : j + half;
        const double a = x[first], b = x[second];
        const double c = args.cos[r * half + j], s = args.sin[r * half + j];
        y[first] = static_cast<float>(a * c - b * s);
        y[second] = static_cast<float>(a * s + b * c);
      }
    }
  }
}

}  // namespace indexcache
