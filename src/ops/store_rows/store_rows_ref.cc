#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/kit/fp8_rows.h"
#include "ops/kit/int8_rows.h"
#include "ops/store_rows/store_rows.h"

namespace indexcache {

void store_rows_ref_rows(const StoreRowsArgs& args, int64_t begin, int64_t end) {
  for (const SeqSpan& seq : args.seqs) {
    const int64_t from = std::max(begin, seq.token_begin),
                  to = std::min(end, seq.token_begin + seq.num_tokens);
    for (int64_t t = from; t < to; ++t) {
      uint8_t* row = args.rows.row(seq.pages, seq.first_position + t - seq.token_begin);
      const float* x = args.x + t * args.ldx;
      if (rows_have_scales(args.rows.dtype)) {
        *args.rows.scale(seq.pages, seq.first_position + t - seq.token_begin) =
            args.rows.dtype == DType::kI8
                ? quantise_row(x, args.rows.row_elements, reinterpret_cast<int8_t*>(row))
                : quantise_fp8_row(x, args.rows.row_elements, row);
        continue;
      }
      if (args.rows.dtype == DType::kF32) {
        std::memcpy(row, x, sizeof(float) * static_cast<size_t>(args.rows.row_elements));
        continue;
      }
      for (int64_t i = 0; i < args.rows.row_elements; ++i) {
        const uint16_t bits = f32_to_bf16(x[i]);
        std::memcpy(row + 2 * i, &bits, sizeof(bits));
      }
    }
  }
}

}  // namespace indexcache
