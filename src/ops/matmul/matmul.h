// y = x w^T, for a group of independent products in one call.
//
//   y[m, n] = sum_k x[m, k] * w[n, k]          (+ y[m, n] first, with `accumulate`)
//
// x and y are float32 with a row stride, so that a slice of the heads of a wider tensor can be read
// and written in place; w is a checkpoint tensor in its own type, read where it is mapped. Groups
// share one call so that the experts of a layer, or the projections of one input, cost one
// synchronisation of the threads. Output ranges must not overlap.
//
// Types. w may be f32, f16, bf16 or fp8 e4m3 with 128x128 block scales (w = fp8 * scale_inv). With
// `Compute::kF32` both operands are used as float32. With `Compute::kBF16` both are rounded to bf16
// (ties to even) before the product. With `Compute::kFP8`, which is for GPUs, that of an fp8 w
// becomes e4m3 in blocks along k and w is not rounded; other products are kBF16's. Products are
// accumulated in float32 in every case. Tolerance
// against ref, which accumulates in double: |y - ref| <= 2 K eps sum_k |x w|, eps = 2^-24 (K
// roundings of the partial sums, one of each product), evaluated on the operands after rounding.
// With `accumulate` y counts as one more product. With `Compute::kBF16`, operands that are
// subnormal in bf16 may count as zero. Hopper's fp8 tensor cores (`sm90_fp8`) keep of the terms of
// one instruction, 32 products and the sum so far, 13 bits below the largest, so that a sum may be
// off by 5 * 33 * 2^-13 of the largest product of its block of 128 besides. Edge cases: m = 0
// writes nothing; k = 0 writes zeros (or leaves y with `accumulate`); NaN and infinity propagate.
// With Exec::batch_invariant on a CPU a row of y depends on its row of x alone, bit for bit, and
// not on m or the other groups. Cost: 2 m n k flops; m k + n k + m n elements.
#pragma once

#include <span>

#include "ops/kit/exec.h"
#include "ops/kit/weight.h"

namespace indexcache {

struct MatmulGroup {
  const float* x = nullptr;  // [m, k], row stride ldx
  int64_t ldx = 0;
  int64_t m = 0;
  Weight w;            // [n, k]
  float* y = nullptr;  // [m, n], row stride ldy
  int64_t ldy = 0;
  // On a GPU with Compute::kBF16 x may be bf16 already, and y rounded to it: given instead of x and
  // y, with the same strides. y16 does not go with `accumulate`.
  const uint16_t* x16 = nullptr;
  uint16_t* y16 = nullptr;
};

struct MatmulArgs {
  std::span<const MatmulGroup> groups;
  Compute compute = Compute::kF32;
  bool accumulate = false;
  bool batch_invariant = false;  // set by matmul() from Exec
};

void matmul(Exec& exec, const MatmulArgs& args);

// The products of a mixture of experts, whose rows are decided on the device: rows
// [row_begin[e], row_begin[e + 1]) of x and y are expert e's.
//
//   y[r, n] = sum_k x[r, k] * weights[e][n, k]
//
// Types, tolerance and edge cases are matmul's. Products with the same row_begin share a call. No
// expert's rows overlap: row_begin ascends from 0 to num_rows.
struct ExpertProduct {
  const float* x = nullptr;  // [num_rows, k], row stride ldx
  int64_t ldx = 0;
  std::span<const Weight> weights;         // one an expert, all of one shape; on a GPU of one type
  const Weight* device_weights = nullptr;  // on a GPU: `weights` in its memory
  float* y = nullptr;                      // [num_rows, n], row stride ldy
  int64_t ldy = 0;
};

struct MatmulExpertsArgs {
  std::span<const ExpertProduct> products;
  const int32_t* row_begin = nullptr;  // [experts + 1]
  int64_t num_rows = 0;
  Compute compute = Compute::kF32;
};

void matmul_experts(Exec& exec, const MatmulExpertsArgs& args);
Cost matmul_cost(const MatmulArgs& args);

}  // namespace indexcache
