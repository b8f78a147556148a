#include "ops/gather_rows/gather_rows.h"
#include "ops/kit/vec.h"

namespace indexcache::INDEXCACHE_ISA {

namespace {

INDEXCACHE_INLINE void copy_row(const float* x, float* y, int64_t n) {
  __builtin_memcpy(y, x, 4 * static_cast<size_t>(n));
}

}  // namespace

void gather_rows_rows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_elements, whole = n - n % kLanes;
  for (int64_t r = begin; r < end; ++r) {
    float* y = args.y + r * n;
    const int64_t id = args.ids[r];
    if (args.dtype == DType::kF32) {
      copy_row(reinterpret_cast<const float*>(args.table) + id * n, y, n);
      continue;
    }
    if (args.dtype != DType::kBF16) {
      gather_rows_ref_rows(args, r, r + 1);
      continue;
    }
    const uint16_t* x = reinterpret_cast<const uint16_t*>(args.table) + id * n;
    for (int64_t i = 0; i < whole; i += kLanes) vec_store(y + i, vec_load_bf16(x + i));
    for (int64_t i = whole; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
      __builtin_memcpy(y + i, &bits, 4);
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
