#include "ops/kit/vec_rows.h"
#include "ops/rope/rope.h"

namespace indexcache::INDEXCACHE_ISA {

void rope_rows(const RopeArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.rope_dim / 2;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t h = 0; h < args.num_heads; ++h) {
      vec_rotate_row(args.x + r * args.ldx + h * args.x_head_stride, args.cos + r * half,
                     args.sin + r * half, half, args.interleaved,
                     args.y + r * args.ldy + h * args.y_head_stride);
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
