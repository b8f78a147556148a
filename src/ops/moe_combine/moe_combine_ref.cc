#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/moe_combine/moe_combine.h"

namespace indexcache {

void moe_combine_ref_rows(const MoeCombineArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < args.row_elements; ++i) {
      double sum = args.y[r * args.row_elements + i];
      for (int64_t j = 0; j < args.num_slots; ++j) {
        const int64_t slot = args.slots[r * args.num_slots + j];
        sum += static_cast<double>(args.weights[r * args.num_slots + j]) *
               args.rows[slot * args.row_elements + i];
      }
      args.y[r * args.row_elements + i] = static_cast<float>(sum);
    }
  }
}

}  // namespace indexcache
