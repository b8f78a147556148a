// Rows of e4m3 with one f32 scale a row: what indexer keys and queries become when keys are cached
// as fp8, as the published engines keep them.
//
//   scale = max |x| / 448, y[i] = x[i] / scale to the nearest e4m3, ties to even, kept to +-448
//
// in f32. A row of zeros, or one so small that its scale is 0, is scale 0 and zeros. A row with NaN
// or infinity is scale NaN and zeros: whatever is made from it is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "ops/kit/paged.h"

namespace indexcache {

// Returns the scale.
inline float quantise_fp8_row(const float* x, int64_t n, uint8_t* y) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  const float scale = finite ? largest / 448 : std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 0; i < n; ++i) y[i] = scale > 0 ? f32_to_f8e4m3(x[i] / scale) : 0;
  return scale;
}

// The row as its blocks of 128 in e4m3 hold it.
inline void round_to_fp8_blocks(float* x, int64_t k) {
  uint8_t values[kFp8Block];
  for (int64_t begin = 0; begin < k; begin += kFp8Block) {
    const int64_t n = std::min<int64_t>(kFp8Block, k - begin);
    const float scale = quantise_fp8_row(x + begin, n, values);
    for (int64_t i = 0; i < n; ++i) x[begin + i] = f8e4m3_to_f32(values[i]) * scale;
  }
}

// What element i of a latent row in fp8 means, in f32.
inline float fp8_latent_element(const PagedRows& rows, const uint8_t* row, int64_t i) {
  const uint8_t* scales = row + rows.fp8_elements;
  if (i < rows.fp8_elements)
    return f8e4m3_to_f32(row[i]) * reinterpret_cast<const float*>(scales)[i / kFp8Block];
  const uint8_t* rest = scales + rows.fp8_elements / kFp8Block * 4;
  return bf16_to_f32(reinterpret_cast<const uint16_t*>(rest)[i - rows.fp8_elements]);
}

}  // namespace indexcache
