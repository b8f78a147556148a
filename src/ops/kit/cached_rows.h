// For ops that make rows and write them into a paged cache: rows.h, with memory for one row in each
// thread. The kernel is `void op_rows(const Args&, int64_t begin, int64_t end, float* row)`; Args
// has `num_rows`, `seqs` that cover them in order, and `rows`, the cache.
#pragma once

#include "ops/kit/paged.h"
#include "ops/kit/rows.h"

namespace indexcache {

template <class Args, void (*kernel)(const Args&, int64_t, int64_t, float*)>
void run_cached_rows(Exec& exec, const Args& args) {
  constexpr int64_t kRowsPerItem = 16;  // as in run_rows()
  const size_t row_bytes = static_cast<size_t>(args.rows.row_elements) * sizeof(float);
  exec.pool.parallel_for(ceil_div(args.num_rows, kRowsPerItem), [&](int64_t item, int thread) {
    const int64_t begin = item * kRowsPerItem;
    kernel(args, begin, std::min(begin + kRowsPerItem, args.num_rows),
           reinterpret_cast<float*>(exec.scratch(thread, row_bytes)));
  });
}

}  // namespace indexcache

#ifdef INDEXCACHE_CUDA
#define INDEXCACHE_CACHED_ROWS_CUDA_LINE(op) \
  {"cuda", op##_cuda_supported, op##_cuda, Device::kCuda},
#else
#define INDEXCACHE_CACHED_ROWS_CUDA_LINE(op)
#endif

#define INDEXCACHE_CACHED_ROWS_TABLE(table, Args, op)                               \
  constexpr OpImpl<Args> table[] = {                                                \
      {"avx512", [](const Args&) { return cpu_features().avx512; },                 \
       run_cached_rows<Args, avx512::op##_rows>},                                   \
      {"avx2", [](const Args&) { return cpu_features().avx2; },                     \
       run_cached_rows<Args, avx2::op##_rows>},                                     \
      INDEXCACHE_CACHED_ROWS_CUDA_LINE(op){"ref", [](const Args&) { return true; }, \
                                           run_cached_rows<Args, op##_ref_rows>},   \
  }
