// The experts of a mixture, for GPUs in bf16: two ops, with the routing's rows between them.
//
//   moe_gate_up:  y[r, n] = bf16(silu(<x[tokens[r], :], gate[e][n, :]>) * <x[tokens[r], :],
//   up[e][n, :]>) moe_down:     y[r, n] = bf16(<x[r, :], down[e][n, :]>)         e: the expert that
//   row r is of
//
// Rows [row_begin[e], row_begin[e + 1]) are expert e's; row_begin ascends from 0 to num_rows, and
// only the GPU knows it (moe_group makes it). silu is silu_mul's. Matrices are bf16, or e4m3 with
// scales of 128x128 blocks, with which rows of x become e4m3 too, as in matmul with Compute::kFP8.
// Sums are f32, nothing is rounded between the products and the one rounding at the end. NaN and
// infinity reach the outputs of their row alone.
//
// Tolerance against ref, which sums in double. With D = 2 k 2^-24 sum_k |x w| the error of a
// product (matmul.h): moe_down |y - ref| <= D + 2^-8 (|ref| + D), the rounding to bf16 on both
// sides. moe_gate_up: silu turns an error D_g of the gate into at most 1.1 D_g, so
//   E = 1.1 D_g (|u| + D_u) + |silu(g)| D_u + 16 2^-24 |silu(g) u|,   |y - ref| <= E + 2^-8 (|ref|
//   + E).
// With e4m3, D grows by sum_b s_b 5 * 33 * 2^-13 max |x w|, the largest product of each block of
// 128 (matmul.h says why).
//
// Cost: 2 or 4 rows n k flops; the matrices of experts that have rows, x and y once.
#pragma once

#include <span>

#include "ops/kit/exec.h"
#include "ops/kit/weight.h"

namespace indexcache {

// One matrix [n, k] of every expert.
struct ExpertMatrices {
  std::span<const Weight> weights;         // all of one type and shape; on a GPU in its memory
  const Weight* device_weights = nullptr;  // on a GPU: `weights` in its memory
};

// Which rows are whose.
struct ExpertRows {
  const int32_t* row_begin = nullptr;  // [experts + 1]
  int64_t num_rows = 0;
};

struct MoeGateUpArgs {
  const uint16_t* x = nullptr;  // [num_tokens, k] bf16
  int64_t num_tokens = 0;
  const int32_t* tokens = nullptr;  // [num_rows] in [0, num_tokens)
  ExpertRows rows;
  ExpertMatrices gate, up;
  uint16_t* y = nullptr;  // [num_rows, n] bf16
};

struct MoeDownArgs {
  const uint16_t* x = nullptr;  // [num_rows, k] bf16
  ExpertRows rows;
  ExpertMatrices down;
  uint16_t* y = nullptr;  // [num_rows, n] bf16
};

// Whether this GPU takes matrices like this: bf16, or with kFP8 on Hopper e4m3; aligned to 16
// bytes, as every row is, with n a multiple of 8.
bool moe_mlp_takes(const Weight& w, Compute compute);

void moe_gate_up(Exec& exec, const MoeGateUpArgs& args);
void moe_down(Exec& exec, const MoeDownArgs& args);

// Best first, `ref` last.
std::span<const OpImpl<MoeGateUpArgs>> moe_gate_up_impls();
std::span<const OpImpl<MoeDownArgs>> moe_down_impls();

}  // namespace indexcache
