// How ops see a paged cache: rows of equal length, 64 to a page, pages found through a table per
// sequence.
#pragma once

#include <cstdint>
#include <span>

#include "tensor/dtype.h"

namespace indexcache {

inline constexpr int64_t kPageTokens = 64;

inline constexpr int64_t kFp8Block = 128;  // elements of a latent row in fp8 with one scale

// Bytes of a latent row in fp8 of which the first fp8_elements are e4m3.
inline int64_t fp8_latent_bytes(int64_t fp8_elements, int64_t row_elements) {
  return fp8_elements + fp8_elements / kFp8Block * 4 + (row_elements - fp8_elements) * 2;
}

// One pool of rows, e.g. the latent KV of one layer. Row of position p of a sequence with page
// table `pages`: page = pages[p / 64], address = base + page * page_bytes + (p % 64) * row_bytes().
//
// int8 and e4m3 rows (ops/kit/int8_rows.h, fp8_rows.h) have a scale each, after the rows of the
// page: a page is [64][row_elements] of one byte, then [64] f32.
//
// Latent rows in fp8 are e4m3 rows with fp8_elements > 0, and their scales lie in them: so many
// e4m3, a f32 scale for each 128 of these (as fp8_rows.h makes it), then the row's other elements
// in bf16. That is 656 bytes for 512 + 64.
struct PagedRows {
  DType dtype = DType::kF32;  // kF32, kBF16, kI8 or kF8E4M3; an op says which it takes
  int64_t row_elements = 0;
  int64_t page_bytes = 0;
  uint8_t* base = nullptr;
  int64_t num_pages = 0;     // of the pool
  int64_t fp8_elements = 0;  // a multiple of kFp8Block

  int64_t row_bytes() const {  // without a scale behind the rows
    return fp8_elements > 0 ? fp8_latent_bytes(fp8_elements, row_elements)
                            : row_elements * dtype_bytes(dtype);
  }
  uint8_t* row(const int32_t* pages, int64_t position) const {
    return base + pages[position / kPageTokens] * page_bytes +
           (position % kPageTokens) * row_bytes();
  }
  // Of a row that has one. Pages lie so that it is aligned.
  float* scale(const int32_t* pages, int64_t position) const {
    return reinterpret_cast<float*>(base + pages[position / kPageTokens] * page_bytes +
                                    kPageTokens * row_elements) +
           position % kPageTokens;
  }
};

inline bool rows_have_scales(DType dtype) { return dtype == DType::kI8 || dtype == DType::kF8E4M3; }

// Bytes of one cached row, its scale included; a page takes 64 times that.
inline int64_t paged_row_bytes(DType dtype, int64_t row_elements) {
  return row_elements * dtype_bytes(dtype) + (rows_have_scales(dtype) ? 4 : 0);
}

// A run of consecutive tokens of one sequence inside a ragged batch: rows [token_begin, token_begin
// + num_tokens) of the batch are positions [first_position, first_position + num_tokens) of the
// sequence.
struct SeqSpan {
  int64_t token_begin = 0;
  int64_t num_tokens = 0;
  int64_t first_position = 0;
  const int32_t* pages = nullptr;  // logical page -> page of the pool; shared by all layers
};

// Ops take the runs of a batch as a span that the host reads. On a GPU they also take the same runs
// in its memory, with page tables there (`device_seqs`); the host's then need no page tables.

}  // namespace indexcache
