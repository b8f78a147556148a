#include "ops/kit/vec.h"
#include "ops/kit/vec_int8.h"
#include "ops/store_rows/store_rows.h"

namespace indexcache::INDEXCACHE_ISA {

void store_rows_rows(const StoreRowsArgs& args, int64_t begin, int64_t end) {
  if (args.rows.dtype == DType::kF32 || args.rows.dtype == DType::kF8E4M3) {
    store_rows_ref_rows(args, begin, end);
    return;
  }
  const int64_t n = args.rows.row_elements, whole = n - n % kLanes;
  for (size_t s = 0; s < args.seqs.size(); ++s) {
    const SeqSpan seq = args.seqs.data()[s];
    int64_t from = seq.token_begin, to = seq.token_begin + seq.num_tokens;
    if (from < begin) from = begin;
    if (to > end) to = end;
    for (int64_t t = from; t < to; ++t) {
      const int64_t position = seq.first_position + t - seq.token_begin;
      uint8_t* page = args.rows.base + seq.pages[position / kPageTokens] * args.rows.page_bytes;
      const float* x = args.x + t * args.ldx;
      if (args.rows.dtype == DType::kI8) {
        int8_t* row = reinterpret_cast<int8_t*>(page) + position % kPageTokens * n;
        reinterpret_cast<float*>(page + kPageTokens * n)[position % kPageTokens] =
            vec_quantise_row(x, n, row);
        continue;
      }
      uint16_t* row = reinterpret_cast<uint16_t*>(page) + position % kPageTokens * n;
      for (int64_t i = 0; i < whole; i += kLanes) vec_store_bf16(row + i, vec_load(x + i));
      if (whole == n) continue;
      float tail[kLanes] = {};
      uint16_t bits[kLanes];
      for (int64_t i = whole; i < n; ++i) tail[i - whole] = x[i];
      vec_store_bf16(bits, vec_load(tail));
      for (int64_t i = whole; i < n; ++i) row[i] = bits[i - whole];
    }
  }
}

}  // namespace indexcache::INDEXCACHE_ISA
