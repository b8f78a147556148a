// What is done to one row in files that are compiled once per instruction set, alone or on its way
// into a cache.
#pragma once

#include "ops/kit/store_row.h"
#include "ops/kit/vec.h"
#include "ops/kit/vec_int8.h"

namespace indexcache {
namespace INDEXCACHE_ISA {

// y[i] = x[i] / sqrt(mean x^2 + eps) * weight[i]; y may be x.
INDEXCACHE_INLINE void vec_rms_norm_row(const float* x, const float* weight, float eps, int64_t n,
                                        float* y) {
  const int64_t whole = n - n % kLanes;
  Vec sums = vec_zero();
  for (int64_t i = 0; i < whole; i += kLanes)
    sums = vec_fma(vec_load(x + i), vec_load(x + i), sums);
  float sum = vec_sum(sums);
  for (int64_t i = whole; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1 / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  const Vec scales = vec_set(scale);
  for (int64_t i = 0; i < whole; i += kLanes) {
    vec_store(y + i, vec_mul(vec_mul(vec_load(x + i), scales), vec_load(weight + i)));
  }
  for (int64_t i = whole; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

INDEXCACHE_INLINE void rotate(float a, float b, float c, float s, float* y_first, float* y_second) {
  *y_first = a * c - b * s;
  *y_second = a * s + b * c;
}

// `half` pairs, as ops/rope says; y may be x. The compiler vectorises both loops; this is below 1%
// of a forward pass, so it gets no intrinsics of its own.
INDEXCACHE_INLINE void vec_rotate_row(const float* x, const float* cos, const float* sin,
                                      int64_t half, bool interleaved, float* y) {
  if (interleaved) {
    for (int64_t j = 0; j < half; ++j)
      rotate(x[2 * j], x[2 * j + 1], cos[j], sin[j], y + 2 * j, y + 2 * j + 1);
  } else {
    for (int64_t j = 0; j < half; ++j)
      rotate(x[j], x[j + half], cos[j], sin[j], y + j, y + j + half);
  }
}

// store_row().
INDEXCACHE_INLINE void vec_store_row(const PagedRows& rows, const int32_t* pages, int64_t position,
                                     const float* x) {
  const int64_t n = rows.row_elements, whole = n - n % kLanes, slot = position % kPageTokens;
  uint8_t* page = rows.base + pages[position / kPageTokens] * rows.page_bytes;
  if (rows.dtype == DType::kF32) {
    __builtin_memcpy(page + slot * n * 4, x, static_cast<size_t>(n) * 4);
    return;
  }
  if (rows.dtype == DType::kI8) {
    reinterpret_cast<float*>(page + kPageTokens * n)[slot] =
        vec_quantise_row(x, n, reinterpret_cast<int8_t*>(page) + slot * n);
    return;
  }
  if (rows.dtype != DType::kBF16) {
    store_row(rows, pages, position, x);
    return;
  }
  uint16_t* row = reinterpret_cast<uint16_t*>(page) + slot * n;
  for (int64_t i = 0; i < whole; i += kLanes) vec_store_bf16(row + i, vec_load(x + i));
  if (whole == n) return;
  float tail[kLanes] = {};
  uint16_t bits[kLanes];
  for (int64_t i = whole; i < n; ++i) tail[i - whole] = x[i];
  vec_store_bf16(bits, vec_load(tail));
  for (int64_t i = whole; i < n; ++i) row[i] = bits[i - whole];
}

}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
