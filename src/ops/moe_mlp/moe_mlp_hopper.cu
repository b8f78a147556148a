// moe_gate_up and moe_down on Hopper, as lines of the ops' tables.
#include <optional>

#include "device/cuda.cuh"
#include "device/gpus.h"
#include "ops/moe_mlp/moe_mlp_impl.h"
#include "ops/moe_mlp/moe_mlp_sm90.cuh"

namespace indexcache {

namespace {

// With fewer rows an expert reading weights is all that counts, and narrow products read at once.
constexpr int64_t kLeastRowsOfExpert = 4;

// Absent where the matrices are not evenly spaced.
std::optional<sm90::MoeMatricesSm90> evenly_spaced(const ExpertMatrices& matrices) {
  const std::span<const Weight> w = matrices.weights;
  const int64_t size = 2 * w[0].rows * w[0].cols;
  const int64_t stride = w.size() > 1 ? w[1].data - w[0].data : size;
  if (stride < size || stride % 16 != 0) return std::nullopt;
  for (size_t e = 0; e < w.size(); ++e) {
    if (w[e].data - w[0].data != static_cast<int64_t>(e) * stride) return std::nullopt;
  }
  return sm90::MoeMatricesSm90{w[0].data, stride};
}

bool is_for_hopper(const ExpertRows& rows, const ExpertMatrices& matrices) {
  const auto num_experts = static_cast<int64_t>(matrices.weights.size());
  return first_gpu_is_hopper() && rows.num_rows > kLeastRowsOfExpert * num_experts &&
         num_experts <= sm90::kMaxMoeExperts && evenly_spaced(matrices).has_value();
}

sm90::MoeProductsSm90 products(const uint16_t* x, const ExpertRows& rows,
                               const ExpertMatrices& matrices, uint16_t* y) {
  sm90::MoeProductsSm90 p;
  p.x = x;
  p.row_begin = rows.row_begin;
  p.num_experts = static_cast<int>(matrices.weights.size());
  p.num_rows = rows.num_rows;
  p.n = matrices.weights[0].rows;
  p.k = matrices.weights[0].cols;
  p.w = *evenly_spaced(matrices);
  p.y = y;
  return p;
}

}  // namespace

bool moe_gate_up_hopper_supported(const MoeGateUpArgs& args) {
  return is_for_hopper(args.rows, args.gate) && evenly_spaced(args.up).has_value();
}

bool moe_down_hopper_supported(const MoeDownArgs& args) {
  return is_for_hopper(args.rows, args.down);
}

void moe_gate_up_hopper(Exec& exec, const MoeGateUpArgs& args) {
  CudaStream& stream = exec.cuda();
  const int64_t k = args.gate.weights[0].cols;
  uint16_t* rows =
      reinterpret_cast<uint16_t*>(stream.scratch(static_cast<size_t>(2 * args.rows.num_rows * k)));
  check_cuda(
      sm90::gather_bf16_rows(args.x, args.tokens, args.rows.num_rows, k, rows, stream_of(stream)),
      "gathering rows");
  sm90::MoeProductsSm90 p = products(rows, args.rows, args.gate, args.y);
  p.up = *evenly_spaced(args.up);
  check_cuda(sm90::moe_products_sm90(p, stream.num_multiprocessors(), stream_of(stream)),
             "products of experts");
}

void moe_down_hopper(Exec& exec, const MoeDownArgs& args) {
  CudaStream& stream = exec.cuda();
  check_cuda(sm90::moe_products_sm90(products(args.x, args.rows, args.down, args.y),
                                     stream.num_multiprocessors(), stream_of(stream)),
             "products of experts");
}

}  // namespace indexcache
