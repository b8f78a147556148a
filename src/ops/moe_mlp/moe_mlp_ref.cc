// The meaning of moe_gate_up and moe_down: obvious loops, sums in double.
#include <cmath>
#include <cstring>

#include "ops/moe_mlp/moe_mlp_impl.h"

namespace indexcache {

namespace {

double dot(const uint16_t* x, const Weight& w, int64_t row) {
  double sum = 0;
  for (int64_t i = 0; i < w.cols; ++i) {
    uint16_t bits;
    std::memcpy(&bits, w.data + 2 * (row * w.cols + i), 2);
    sum += static_cast<double>(bf16_to_f32(x[i])) * bf16_to_f32(bits);
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
    const uint16_t* x = args.x + args.tokens[r] * gate.cols;
    for (int64_t n = 0; n < gate.rows; ++n)
      args.y[r * gate.rows + n] =
          f32_to_bf16(static_cast<float>(silu(dot(x, gate, n)) * dot(x, up, n)));
  });
}

void moe_down_ref(Exec& exec, const MoeDownArgs& args) {
  for_rows(exec, args.rows, args.down.weights.size(), [&](size_t e, int64_t r) {
    const Weight& w = args.down.weights[e];
    for (int64_t n = 0; n < w.rows; ++n)
      args.y[r * w.rows + n] = f32_to_bf16(static_cast<float>(dot(args.x + r * w.cols, w, n)));
  });
}

}  // namespace indexcache
