// Vector kernels of sparse_mla, compiled once per instruction set.
//
// A span is a run of selected positions of one query token, attended by all heads at once, so that
// every gathered row is fetched once. A token's selection is one span, or several that run in
// parallel and are merged.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ops/kit/isa.h"

namespace indexcache {

struct SparseMlaSpan {
  const float* q;  // [num_heads, row_elements] of this token
  int64_t num_heads;
  int64_t value_dim;
  int64_t row_elements;
  float scale;
  bool rows_are_bf16;  // else f32
  const uint8_t* base;
  int64_t page_bytes;
  const int32_t* pages;
  const int32_t* positions;  // [count]
  int64_t count;
  uint8_t* scratch;  // sparse_mla_scratch_bytes(), 64-byte aligned
  float* out;        // [num_heads, value_dim]
  // [num_heads] each, both or neither. With them `out` stays a sum weighted by exp(a - max), for
  // sparse_mla_merge; without them it is divided by the sum of the weights.
  float* max;
  float* sum;
};

// out[d] = sum_i weight_i part_i[d] for one head, where part_i, max_i and sum_i of span i lie i *
// part_stride and i * max_stride floats behind the first.
struct SparseMlaMerge {
  const float* part;
  int64_t part_stride;
  const float* max;
  const float* sum;
  int64_t max_stride;
  int64_t num_parts;  // >= 1
  int64_t value_dim;
  float* out;
};

inline constexpr int64_t kSparseMlaPageTokens = 64;

#define INDEXCACHE_DECLARE(isa, feature)                                                      \
  namespace isa {                                                                             \
  size_t sparse_mla_scratch_bytes(int64_t num_heads, int64_t value_dim, int64_t row_elements, \
                                  bool rows_are_bf16);                                        \
  void sparse_mla_span(const SparseMlaSpan& span);                                            \
  void sparse_mla_merge(const SparseMlaMerge& merge);                                         \
  }
INDEXCACHE_FOR_EACH_ISA(INDEXCACHE_DECLARE)
#undef INDEXCACHE_DECLARE

}  // namespace indexcache
