// ops/kit/int8_rows.h for files that are compiled once per instruction set: plain loops that the
// compiler turns into vectors.
#pragma once

#include "ops/kit/vec.h"

namespace indexcache {
namespace INDEXCACHE_ISA {

// Returns the scale.
INDEXCACHE_INLINE float vec_quantise_row(const float* x, int64_t n, int8_t* y) {
  // Magnitudes compare as integers, NaN above infinity above all others.
  constexpr int32_t kInfinityBits = 0x7F800000;
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7FFFFFFF;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof(largest));
  const float scale = largest_bits < kInfinityBits ? largest / 127 : __builtin_nanf("");
  if (!(scale > 0)) {
    __builtin_memset(y, 0, static_cast<size_t>(n));
    return scale;
  }
  for (int64_t i = 0; i < n; ++i) {
    float value = x[i] / scale;
    value = value > 127 ? 127 : value;
    value = value < -127 ? -127 : value;
    // 1.5 * 2^23 leaves no bits for a fraction, so the sum rounds as wanted, ties to even.
    const float shifted = value + 0x1.8p23f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    y[i] = static_cast<int8_t>(bits - 0x4B400000);
  }
  return scale;
}

}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
