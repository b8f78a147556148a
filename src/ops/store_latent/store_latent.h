// From the projection to the cache: the latent KV of new tokens.
//
//   y[r, 0:latent_dim] = x[r, 0:latent_dim] / sqrt(mean x[r, 0:latent_dim]^2 + eps) * weight
//   y[r, latent_dim:]  = x[r, latent_dim:] rotated, interleaved (ops/rope)
//   cache row of position first_position + i  =  y[token_begin + i, :]   for every span of `seqs`
//
// Norm and rotation are f32; the row is then rounded to the cache's type: bf16 to nearest, ties to
// even (NaN stays NaN); fp8 as ops/kit/paged.h says: e4m3 with a scale for each 128 of the first
// part, bf16 behind. Pages of distinct sequences are distinct, and so are positions: rows are
// independent, and nothing but the rows of the spans is written. A row of zeros gives zeros; NaN
// and infinity stay within their row, in the rotated part within their pair.
//
// Tolerance of y against ref (double): (latent_dim + 8) 2^-24 relative in the first part, 4 * 2^-24
// (|a| + |b|) of the pair in the second. What is cached is y of the same implementation, rounded
// once.
//
// Cost: one row read and one written for each token; of a few tokens on a GPU the start of one
// kernel.
#pragma once

#include "ops/kit/exec.h"
#include "ops/kit/isa.h"
#include "ops/kit/paged.h"

namespace indexcache {

struct StoreLatentArgs {
  const float* x = nullptr;  // [num_rows, rows.row_elements], row stride ldx
  int64_t ldx = 0;
  int64_t num_rows = 0;
  int64_t latent_dim = 0;         // kv_lora_rank; what follows in the row is even
  const float* weight = nullptr;  // [latent_dim]
  float eps = 0;
  const float* cos = nullptr;  // [num_rows, (rows.row_elements - latent_dim) / 2]
  const float* sin = nullptr;
  std::span<const SeqSpan> seqs;         // cover rows [0, num_rows) in order
  PagedRows rows;                        // kF32, kBF16, or fp8 with latent_dim fp8_elements
  const SeqSpan* device_seqs = nullptr;  // on a GPU: `seqs` in its memory
};

void store_latent(Exec& exec, const StoreLatentArgs& args);

void store_latent_ref_rows(const StoreLatentArgs& args, int64_t begin, int64_t end, float* row);
bool store_latent_cuda_supported(const StoreLatentArgs& args);  // latent_dim up to 1024
void store_latent_cuda(Exec& exec, const StoreLatentArgs& args);
INDEXCACHE_DECLARE_FOR_ISAS(void store_latent_rows(const StoreLatentArgs& args, int64_t begin,
                                                   int64_t end, float* row))

}  // namespace indexcache
