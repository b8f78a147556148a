// The meaning of moe_gate_up and moe_down: obvious loops, sums in double.
#include <cmath>
#include <vector>

#include "base/checked.h"
#include "ops/kit/fp8_rows.h"
#include "ops/moe_mlp/moe_mlp_impl.h"
#include "tensor/tensor.h"

namespace indexcache {

namespace {

// A row of x as products with `w` take it.
std::vector<float> input_row(const uint16_t* x, const Weight& w) {
  std::vector<float> row;
  for (int64_t i = 0; i < w.cols; ++i) row.push_back(bf16_to_f32(x[i]));
  if (w.dtype == DType::kF8E4M3) round_to_fp8_blocks(row.data(), w.cols);
  return row;
}

double dot(const std::vector<float>& x, const Weight& w, int64_t row) {
  const TensorView view = {w.dtype, {w.rows, w.cols}, w.data};
  double sum = 0;
  for (int64_t i = 0; i < w.cols; ++i) {
    const float value = element_as_f32(view, row * w.cols + i);
    const float scale =
        w.dtype == DType::kF8E4M3
            ? w.scale_inv[row / kFp8Block * ceil_div(w.cols, kFp8Block) + i / kFp8Block]
            : 1;
    sum += static_cast<double>(x[static_cast<size_t>(i)]) * value * scale;
  }
  return sum;
}

double silu(double z) {
  if (z == -HUGE_VAL) return 0;  // the limit
  return z / (1 + std::exp(-z));
}

// Calls row(expert, r) for every row of every expert.
template <class Row>
void for_rows(Exec& exec, const ExpertRows& rows, size_t num_experts, const Row& row) {
  for (size_t e = 0; e < num_experts; ++e) {
    const int64_t begin = rows.row_begin[e];
    CHECK_GE(rows.row_begin[e + 1], begin);
    exec.pool.parallel_for(rows.row_begin[e + 1] - begin,
                           [&](int64_t i, int) { row(e, begin + i); });
  }
}

}  // namespace

void moe_gate_up_ref(Exec& exec, const MoeGateUpArgs& args) {
  for_rows(exec, args.rows, args.gate.weights.size(), [&](size_t e, int64_t r) {
    const Weight &gate = args.gate.weights[e], &up = args.up.weights[e];
    const std::vector<float> x = input_row(args.x + args.tokens[r] * gate.cols, gate);
    for (int64_t n = 0; n < gate.rows; ++n)
      args.y[r * gate.rows + n] =
          f32_to_bf16(static_cast<float>(silu(dot(x, gate, n)) * dot(x, up, n)));
  });
}

void moe_down_ref(Exec& exec, const MoeDownArgs& args) {
  for_rows(exec, args.rows, args.down.weights.size(), [&](size_t e, int64_t r) {
    const Weight& w = args.down.weights[e];
    const std::vector<float> x = input_row(args.x + r * w.cols, w);
    for (int64_t n = 0; n < w.rows; ++n)
      args.y[r * w.rows + n] = f32_to_bf16(static_cast<float>(dot(x, w, n)));
  });
}

}  // namespace indexcache
