// For ops that treat every row by itself: the rows are cut into items for the thread pool, and one
// table line per instruction set is made from a kernel `void op_rows(const Args&, int64_t begin,
// int64_t end)`. Args has `num_rows`.
#pragma once

#include <algorithm>

#include "base/checked.h"
#include "ops/kit/exec.h"
#include "ops/kit/isa.h"

namespace indexcache {

template <class Args, void (*kernel)(const Args&, int64_t, int64_t)>
void run_rows(Exec& exec, const Args& args) {
  // 16 rows of a few thousand floats take some microseconds: more than handing out an item costs.
  constexpr int64_t kRowsPerItem = 16;
  exec.pool.parallel_for(ceil_div(args.num_rows, kRowsPerItem), [&](int64_t item, int) {
    const int64_t begin = item * kRowsPerItem;
    kernel(args, begin, std::min(begin + kRowsPerItem, args.num_rows));
  });
}

}  // namespace indexcache

// Its line for a GPU, in builds that have it.
#ifdef INDEXCACHE_CUDA
#define INDEXCACHE_ROWS_CUDA_LINE(op) \
  {"cuda", [](const auto&) { return true; }, op##_cuda, Device::kCuda},
#else
#define INDEXCACHE_ROWS_CUDA_LINE(op)
#endif

// The table of such an op. The bf16 dot product has nothing to offer it, so AVX-512 without it is
// the best line.
#define INDEXCACHE_ROWS_TABLE(table, Args, op)                                                    \
  constexpr OpImpl<Args> table[] = {                                                              \
      {"avx512", [](const Args&) { return cpu_features().avx512; },                               \
       run_rows<Args, avx512::op##_rows>},                                                        \
      {"avx2", [](const Args&) { return cpu_features().avx2; }, run_rows<Args, avx2::op##_rows>}, \
      INDEXCACHE_ROWS_CUDA_LINE(op){"ref", [](const Args&) { return true; },                      \
                                    run_rows<Args, op##_ref_rows>},                               \
  }
