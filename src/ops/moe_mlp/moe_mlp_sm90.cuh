// The interface of the Hopper kernels of moe_gate_up and moe_down.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace indexcache::sm90 {

inline constexpr int kMaxMoeExperts = 1024;

// Matrices [n, k] of the experts, bf16, evenly spaced.
struct MoeMatricesSm90 {
  const void* first = nullptr;
  int64_t stride_bytes = 0;  // a multiple of 16, also for one expert
};

// y = bf16(x w^T) for the rows of each expert; with `up`, y = bf16(silu(x w^T) * (x up^T)).
struct MoeProductsSm90 {
  const uint16_t* x = nullptr;         // [num_rows, k]
  const int32_t* row_begin = nullptr;  // [num_experts + 1], read on the GPU
  int num_experts = 0;
  int64_t num_rows = 0, n = 0, k = 0;  // n and k multiples of 8
  MoeMatricesSm90 w, up;
  uint16_t* y = nullptr;  // [num_rows, n]
};

cudaError_t moe_products_sm90(const MoeProductsSm90& args, int num_multiprocessors,
                              cudaStream_t stream);

// y[r, :] = x[ids[r], :], rows of k bf16.
cudaError_t gather_bf16_rows(const uint16_t* x, const int32_t* ids, int64_t num_rows, int64_t k,
                             uint16_t* y, cudaStream_t stream);

}  // namespace indexcache::sm90
