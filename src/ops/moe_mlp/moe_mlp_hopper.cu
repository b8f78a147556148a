// moe_gate_up and moe_down on Hopper, as lines of the ops' tables.
#include <optional>

#include "device/cuda.cuh"
#include "device/gpus.h"
#include "ops/kit/grouped_products_sm90.cuh"
#include "ops/moe_mlp/moe_mlp_impl.h"

namespace indexcache {

namespace {

// With fewer rows an expert reading weights is all that counts, and narrow products read at once.
constexpr int64_t kLeastRowsOfExpert = 4;

bool is_fp8(const ExpertMatrices& matrices) { return matrices.weights[0].dtype == DType::kF8E4M3; }

// Absent where the matrices are not evenly spaced.
std::optional<sm90::GroupedMatrices> evenly_spaced(const ExpertMatrices& matrices) {
  const std::span<const Weight> w = matrices.weights;
  const int64_t size = dtype_bytes(w[0].dtype) * w[0].rows * w[0].cols;
  const int64_t stride = w.size() > 1 ? w[1].data - w[0].data : size;
  const int64_t scale_stride =
      w.size() > 1 && is_fp8(matrices) ? w[1].scale_inv - w[0].scale_inv : 0;
  if (stride < size || stride % 16 != 0) return std::nullopt;
  for (size_t e = 0; e < w.size(); ++e) {
    const auto at = static_cast<int64_t>(e);
    if (w[e].data - w[0].data != at * stride) return std::nullopt;
    if (is_fp8(matrices) && w[e].scale_inv - w[0].scale_inv != at * scale_stride)
      return std::nullopt;
  }
  return sm90::GroupedMatrices{w[0].data, stride, w[0].scale_inv, scale_stride};
}

bool is_for_hopper(const ExpertRows& rows, const ExpertMatrices& matrices) {
  const auto num_experts = static_cast<int64_t>(matrices.weights.size());
  return first_gpu_is_hopper() &&
         (is_fp8(matrices) || rows.num_rows > kLeastRowsOfExpert * num_experts) &&
         num_experts <= sm90::kMaxGroups && evenly_spaced(matrices).has_value();
}

// y [rows.num_rows, n] from x [num_rows, k] as bf16, in the order of `rows` or, with `ids`, to be
// brought into it.
void run(CudaStream& stream, const uint16_t* x, const int32_t* ids, const ExpertRows& rows,
         const ExpertMatrices& matrices, const ExpertMatrices* up, uint16_t* y) {
  const int64_t n = matrices.weights[0].rows, k = matrices.weights[0].cols;
  sm90::GroupedProducts p;
  p.x = x;
  p.row_begin = rows.row_begin;
  p.num_groups = static_cast<int>(matrices.weights.size());
  p.num_rows = rows.num_rows;
  p.n = n;
  p.k = k;
  p.w = *evenly_spaced(matrices);
  if (up != nullptr) p.up = *evenly_spaced(*up);
  p.y16 = y;
  p.ldy = n;
  if (is_fp8(matrices)) {
    sm90::QuantiseRows quantise{.x16 = x, .ldx = k, .ids = ids, .num_rows = rows.num_rows, .k = k};
    sm90::place_quantised(stream.scratch(sm90::quantised_bytes(rows.num_rows, k)), &quantise);
    check_cuda(sm90::quantise_rows(quantise, stream_of(stream)), "rounding rows to fp8");
    p.x = quantise.values;
    p.x_scales = quantise.scales;
  } else if (ids != nullptr) {
    uint16_t* gathered =
        reinterpret_cast<uint16_t*>(stream.scratch(static_cast<size_t>(2 * rows.num_rows * k)));
    check_cuda(sm90::gather_bf16_rows(x, ids, rows.num_rows, k, gathered, stream_of(stream)),
               "gathering rows");
    p.x = gathered;
  }
  check_cuda(sm90::grouped_products(p, stream.num_multiprocessors(), stream_of(stream)),
             "products of experts");
}

}  // namespace

bool moe_gate_up_hopper_supported(const MoeGateUpArgs& args) {
  return is_for_hopper(args.rows, args.gate) && evenly_spaced(args.up).has_value();
}

bool moe_down_hopper_supported(const MoeDownArgs& args) {
  return is_for_hopper(args.rows, args.down);
}

void moe_gate_up_hopper(Exec& exec, const MoeGateUpArgs& args) {
  run(exec.cuda(), args.x, args.tokens, args.rows, args.gate, &args.up, args.y);
}

void moe_down_hopper(Exec& exec, const MoeDownArgs& args) {
  run(exec.cuda(), args.x, nullptr, args.rows, args.down, nullptr, args.y);
}

}  // namespace indexcache
