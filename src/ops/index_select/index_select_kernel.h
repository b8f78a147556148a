// What index_select.cc and the vector kernels (compiled once per instruction set) say to each
// other. Plain data and declarations only: see ops/kit/isa.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace indexcache {

enum class IndexKeys { kF32, kBF16, kI8 };

// Scores the keys [key_begin, key_end) for a block of consecutive queries of one sequence and keeps
// the best k of those that each query sees, in ascending position.
struct IndexSelectTask {
  const float* q;        // [num_queries, num_heads, head_dim]
  const float* weights;  // [num_queries, num_heads]
  int64_t num_queries;   // 1..kernel's lanes
  int64_t first_position;
  int64_t num_heads;
  int64_t head_dim;
  const uint8_t* key_base;
  int64_t page_bytes;
  const int32_t* pages;
  IndexKeys keys;
  int64_t key_begin;  // multiple of the page length
  int64_t key_end;    // at most the last query's position + 1
  int64_t k;
  uint8_t* scratch;  // scratch_bytes(task), 64-byte aligned, this thread's own
  // Out, for query i: counts[i] = min(k, keys seen) candidates at [i * stride]. `ranks` are the
  // scores as signed integers of the same order, wanted only where several ranges of keys are
  // merged afterwards (else null).
  int64_t stride;
  int32_t* positions;
  int32_t* ranks;
  int32_t* counts;
};

struct IndexSelectKernel {
  int64_t lanes;  // queries in a block
  size_t (*scratch_bytes)(const IndexSelectTask& task);
  void (*scan)(const IndexSelectTask& task);
  // Keeps the k highest of n candidates (n >= k) in place and in order; among equals the earlier
  // ones. Both arrays have room for n + lanes.
  void (*keep_best)(int32_t* ranks, int32_t* positions, int64_t n, int64_t k);
};

}  // namespace indexcache
