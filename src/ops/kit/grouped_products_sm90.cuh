// Products of rows that are grouped by their matrix, on Hopper: the experts of a mixture, or one
// matrix for all rows. bf16, or e4m3 with scales of blocks; sums are f32.
//
// Roofline. Products of many rows are bound by the tensor cores: 2 rows n k flops at 989 TFLOP/s in
// bf16 and 1979 in e4m3; products of few rows by reading the matrices, at 4.8 TB/s on an H200.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/checked.h"
#include "ops/kit/paged.h"

namespace indexcache::sm90 {

inline constexpr int kMaxGroups = 1024;

// Matrices [n, k], evenly spaced: bf16, or e4m3 where there is `scale_inv`.
struct GroupedMatrices {
  const void* first = nullptr;
  int64_t stride_bytes = 0;          // a multiple of 16, also for one matrix
  const float* scale_inv = nullptr;  // [ceil(n/128), ceil(k/128)] each
  int64_t scale_stride = 0;          // in elements
};

// y = x w^T for the rows of each matrix; with `up`, y = silu(x w^T) * (x up^T).
//
// e4m3: y[r, j] = sum_b x_scales[b, r] scale_inv[j/128, b] sum_(i in block b) x[r, i] w[j, i]. The
// inner sums are made by the tensor cores, which keep of the terms of one instruction, 32 products
// and the sum so far, 13 bits below the largest; the outer one is f32.
struct GroupedProducts {
  const void* x = nullptr;             // [num_rows, k] bf16 or e4m3, as the matrices
  const float* x_scales = nullptr;     // e4m3: [ceil(k/128), num_rows]
  const int32_t* row_begin = nullptr;  // [num_groups + 1], read on the GPU; null: all are one's
  int num_groups = 1;
  int64_t num_rows = 0, n = 0, k = 0;  // n a multiple of 8, rows of k of 16 bytes
  GroupedMatrices w, up;
  // One of both, [num_rows, n] with row stride ldy: y16 a multiple of 4 elements, y of 2, and both
  // aligned to 8 bytes. y only for e4m3 without `up`, and added to with `accumulate`.
  uint16_t* y16 = nullptr;
  float* y = nullptr;
  int64_t ldy = 0;
  bool accumulate = false;
};

cudaError_t grouped_products(const GroupedProducts& args, int num_multiprocessors,
                             cudaStream_t stream);

// y[r, :] = x[ids[r], :], rows of k bf16, k a multiple of 8.
cudaError_t gather_bf16_rows(const uint16_t* x, const int32_t* ids, int64_t num_rows, int64_t k,
                             uint16_t* y, cudaStream_t stream);

// Rows as e4m3 with a scale for each 128 elements (ops/kit/fp8_rows.h says how they are rounded).
struct QuantiseRows {
  const float* x = nullptr;  // or x16; rows with stride ldx
  const uint16_t* x16 = nullptr;
  int64_t ldx = 0;
  const int32_t* ids = nullptr;  // row r is x[ids[r]]; null: x[r]
  int64_t num_rows = 0, k = 0;   // k and ldx multiples of 4, x aligned to 16 bytes, x16 to 8
  uint8_t* values = nullptr;     // [num_rows, k]
  float* scales = nullptr;       // [ceil(k/128), num_rows]
};
cudaError_t quantise_rows(const QuantiseRows& args, cudaStream_t stream);

// The memory that `values` and `scales` take, and where they lie in it.
inline int64_t quantised_value_bytes(int64_t num_rows, int64_t k) {
  return round_up(num_rows * k, int64_t{256});
}
inline size_t quantised_bytes(int64_t num_rows, int64_t k) {
  return static_cast<size_t>(quantised_value_bytes(num_rows, k) +
                             4 * num_rows * ceil_div(k, kFp8Block));
}
inline void place_quantised(uint8_t* memory, QuantiseRows* rows) {
  rows->values = memory;
  rows->scales = reinterpret_cast<float*>(memory + quantised_value_bytes(rows->num_rows, rows->k));
}

}  // namespace indexcache::sm90
