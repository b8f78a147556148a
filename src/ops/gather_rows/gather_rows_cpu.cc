#include "ops/gather_rows/gather_rows.h"
#include "ops/kit/vec.h"

namespace indexcache::INDEXCACHE_ISA {

void gather_rows_rows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.row_elements, whole = n - n % kLanes;
  for (int64_t r = begin; r < end; ++r) {
    float* y = args.y + r * n;
    const int64_t id = args.ids[r];
    if (args.dtype == DType::kF32) {
      __builtin_memcpy(y, args.table + id * 4 * n, 4 * static_cast<size_t>(n));
      continue;
    }
    if (args.dtype != DType::kBF16) {
      gather_rows_ref_rows(args, r, r + 1);
      continue;
    }
    const uint8_t* x = args.table + id * 2 * n;
    for (int64_t i = 0; i < whole; i += kLanes)
      vec_store(y + i, vec_load_bf16(reinterpret_cast<const uint16_t*>(x + 2 * i)));
    for (int64_t i = whole; i < n; ++i) {
      uint16_t half;
      __builtin_memcpy(&half, x + 2 * i, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      __builtin_memcpy(y + i, &bits, 4);
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
