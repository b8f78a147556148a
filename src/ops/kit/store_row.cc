#include "ops/kit/store_row.h"

#include <cstring>

#include "ops/kit/fp8_rows.h"
#include "ops/kit/int8_rows.h"

namespace indexcache {

namespace {

void store_bf16(const float* x, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = f32_to_bf16(x[i]);
    std::memcpy(to + 2 * i, &bits, sizeof(bits));
  }
}

void store_fp8_latent(const float* x, int64_t n, int64_t fp8_elements, uint8_t* row) {
  uint8_t* to = row + fp8_elements;
  for (int64_t i = 0; i < fp8_elements; i += kFp8Block, to += sizeof(float)) {
    const float scale = quantise_fp8_row(x + i, kFp8Block, row + i);
    std::memcpy(to, &scale, sizeof(scale));
  }
  store_bf16(x + fp8_elements, n - fp8_elements, to);
}

}  // namespace

void store_row(const PagedRows& rows, const int32_t* pages, int64_t position, const float* x) {
  uint8_t* row = rows.row(pages, position);
  const int64_t n = rows.row_elements;
  switch (rows.dtype) {
    case DType::kI8:
      *rows.scale(pages, position) = quantise_row(x, n, reinterpret_cast<int8_t*>(row));
      return;
    case DType::kF8E4M3:
      if (rows.fp8_elements > 0) return store_fp8_latent(x, n, rows.fp8_elements, row);
      *rows.scale(pages, position) = quantise_fp8_row(x, n, row);
      return;
    case DType::kF32:
      std::memcpy(row, x, sizeof(float) * static_cast<size_t>(n));
      return;
    default:
      store_bf16(x, n, row);
  }
}

}  // namespace indexcache
