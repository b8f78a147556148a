// From the projection to the cache: the indexer keys of new tokens.
//
//   n[r, i] = (x[r, i] - mean) / sqrt(variance + eps) * weight[i] + bias[i]
//   y[r, :] = n[r, :] with its first rope_dim elements rotated, interleaved or half-split
//   (ops/rope) cache row of position first_position + i  =  y[token_begin + i, :]   for every span
//   of `seqs`
//
// The norm is the indexer's k_norm (DeepSeek-V3.2 reference); its variance is the biased one,
// computed from the centred values (two passes). Norm and rotation are f32; the row is then put
// into the cache's type: bf16 to nearest, ties to even (NaN stays NaN); int8 and e4m3 rows and
// their scales are as ops/kit/int8_rows.h and fp8_rows.h say. Pages of distinct sequences are
// distinct, and so are positions: rows are independent, and nothing but the rows of the spans, and
// their scales, is written. NaN and infinity stay within their row.
//
// Tolerance against ref (double): e_i = (row_elements + 8) 2^-24 (max |x| / sqrt(variance + eps)
// |weight_i| + |bias_i|) for n, and |cos| e_a + |sin| e_b + 4 * 2^-24 (|a| + |b|) for an element of
// a rotated pair n_a, n_b. What is cached is y of the same implementation, rounded once.
//
// Cost: one row read and one written for each token; of a few tokens on a GPU the start of one
// kernel.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"
#include "ops/kit/paged.h"

namespace indexcache {

struct StoreIndexKeyArgs {
  const float* x = nullptr;  // [num_rows, rows.row_elements], row stride ldx
  int64_t ldx = 0;
  int64_t num_rows = 0;
  const float* weight = nullptr;  // [rows.row_elements]
  const float* bias = nullptr;    // [rows.row_elements]
  float eps = 0;
  int64_t rope_dim = 0;  // even, at most row_elements
  bool interleaved = true;
  const float* cos = nullptr;  // [num_rows, rope_dim / 2]
  const float* sin = nullptr;
  std::span<const SeqSpan> seqs;         // cover rows [0, num_rows) in order
  PagedRows rows;                        // kF32, kBF16, kI8 or kF8E4M3
  const SeqSpan* device_seqs = nullptr;  // on a GPU: `seqs` in its memory
};

void store_index_key(Exec& exec, const StoreIndexKeyArgs& args);

void store_index_key_ref_rows(const StoreIndexKeyArgs& args, int64_t begin, int64_t end,
                              float* row);
bool store_index_key_cuda_supported(const StoreIndexKeyArgs& args);  // rows of up to 1024 elements
void store_index_key_cuda(Exec& exec, const StoreIndexKeyArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void store_index_key_rows(const StoreIndexKeyArgs& args, int64_t begin,
                                                      int64_t end, float* row))

}  // namespace indexcache
