#include "ops/kit/store_row.h"

#include <cstring>

#include "ops/kit/fp8_rows.h"
#include "ops/kit/int8_rows.h"

namespace indexcache {

void store_row(const PagedRows& rows, const int32_t* pages, int64_t position, const float* x) {
  uint8_t* row = rows.row(pages, position);
  const int64_t n = rows.row_elements;
  switch (rows.dtype) {
    case DType::kI8:
      *rows.scale(pages, position) = quantise_row(x, n, reinterpret_cast<int8_t*>(row));
      return;
    case DType::kF8E4M3:
      *rows.scale(pages, position) = quantise_fp8_row(x, n, row);
      return;
    case DType::kF32:
      std::memcpy(row, x, sizeof(float) * static_cast<size_t>(n));
      return;
    default:
      for (int64_t i = 0; i < n; ++i) {
        const uint16_t bits = f32_to_bf16(x[i]);
        std::memcpy(row + 2 * i, &bits, sizeof(bits));
      }
  }
}

}  // namespace indexcache
