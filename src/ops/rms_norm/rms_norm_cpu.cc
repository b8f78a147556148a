#include "ops/kit/vec_rows.h"
#include "ops/rms_norm/rms_norm.h"

namespace indexcache::INDEXCACHE_ISA {

void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    vec_rms_norm_row(args.x + r * args.ldx, args.weight, args.eps, args.row_elements,
                     args.y + r * args.ldy);
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
