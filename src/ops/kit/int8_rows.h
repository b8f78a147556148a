// Rows of 8-bit integers with one f32 scale a row: what indexer keys and queries become when keys
// are cached as int8.
//
//   scale = max |x| / 127, y[i] = x[i] / scale to nearest, ties to even, kept to [-127, 127]
//
// in f32. A row of zeros, or one so small that its scale is 0, is scale 0 and zeros. A row with NaN
// or infinity is scale NaN and zeros: whatever is made from it is NaN. Files that are compiled once
// per instruction set use ops/kit/vec_int8.h, which does the same bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace indexcache {

// Returns the scale.
inline float quantise_row(const float* x, int64_t n, int8_t* y) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  const float scale = finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 0; i < n; ++i) {
    const float value = scale > 0 ? std::clamp(x[i] / scale, -127.0f, 127.0f) : 0.0f;
    y[i] = static_cast<int8_t>(std::nearbyintf(value));
  }
  return scale;
}

}  // namespace indexcache
