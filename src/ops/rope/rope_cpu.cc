#include "ops/kit/vec.h"
#include "ops/rope/rope.h"

namespace indexcache::INDEXCACHE_ISA {

namespace {

INDEXCACHE_INLINE void rotate(float a, float b, float c, float s, float* y_first, float* y_second) {
  *y_first = a * c - b * s;
  *y_second = a * s + b * c;
}

}  // namespace

// The compiler vectorises both loops; the op is below 1% of a forward pass, so it gets no
// intrinsics of its own.
void rope_rows(const RopeArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.rope_dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    const float* cos = args.cos + r * half;
    const float* sin = args.sin + r * half;
    for (int64_t h = 0; h < args.num_heads; ++h) {
      const float* x = args.x + r * args.ldx + h * args.x_head_stride;
      float* y = args.y + r * args.ldy + h * args.y_head_stride;
      if (args.interleaved) {
        for (int64_t j = 0; j < half; ++j)
          rotate(x[2 * j], x[2 * j + 1], cos[j], sin[j], y + 2 * j, y + 2 * j + 1);
      } else {
        for (int64_t j = 0; j < half; ++j)
          rotate(x[j], x[j + half], cos[j], sin[j], y + j, y + j + half);
      }
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
