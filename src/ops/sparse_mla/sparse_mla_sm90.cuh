// Sparse MLA on Hopper, for rows of 512 + 64 bf16 or fp8 (ops/kit/paged.h): what the files
// *_sm90.cu of this folder offer to the op's table. Plain functions that put kernels on a stream;
// none waits for the GPU. The rules of the op (sparse_mla.h) hold, with q, the softmax weights and
// what fp8 rows mean rounded to bf16.
//
// All pointers are of the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ops/kit/paged.h"

namespace indexcache::sm90 {

inline constexpr int kLatentDim = 512, kLatentRow = 576;

struct SparseMlaSm90Args {
  const void* q = nullptr;  // [num_tokens, num_heads, 576] f32 or bf16; 16-byte aligned
  bool q_is_bf16 = false;
  int num_heads = 0;  // 1 to 128
  float scale = 0;
  // Pages of [64][576] bf16, or of 64 rows of 656 bytes; 16-byte aligned, as is page_bytes. fp8
  // rows lie within 64 GiB.
  const uint8_t* rows = nullptr;
  bool rows_are_fp8 = false;
  int64_t page_bytes = 0;
  const SeqSpan* seqs = nullptr;  // [num_seqs]
  int num_seqs = 0;
  int num_tokens = 0;
  const int32_t* positions = nullptr;  // [num_tokens, k] ascending
  const int32_t* counts = nullptr;     // [num_tokens]
  int k = 0;
  void* out = nullptr;  // [num_tokens, num_heads, 512] f32 or bf16
  bool out_is_bf16 = false;
};

// Into how many parts the selection of a token is cut, so that few tokens occupy all
// multiprocessors. It depends on the shapes alone.
int sparse_mla_num_parts(int num_tokens, int num_heads, int k, int num_multiprocessors);

// Bytes of `workspace` for that many parts; 0 for one part.
int64_t sparse_mla_workspace(int num_tokens, int num_heads, int num_parts);

cudaError_t sparse_mla_sm90(const SparseMlaSm90Args& args, int num_parts, void* workspace,
                            int num_multiprocessors, cudaStream_t stream);

}  // namespace indexcache::sm90
