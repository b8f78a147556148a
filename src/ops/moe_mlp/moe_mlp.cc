// Checks the contracts of moe_gate_up and moe_down and chooses an implementation.
#include "ops/moe_mlp/moe_mlp.h"

#include <algorithm>

#include "device/gpus.h"

#include "ops/moe_mlp/moe_mlp_impl.h"

namespace indexcache {

namespace {

[[maybe_unused]] bool is_bf16(const ExpertMatrices& matrices) {
  return matrices.weights[0].dtype == DType::kBF16;
}

constexpr OpImpl<MoeGateUpArgs> kGateUpImpls[] = {
#if defined(INDEXCACHE_CUDA) && !defined(INDEXCACHE_CUDA_EMULATION)
    {"sm90", moe_gate_up_hopper_supported, moe_gate_up_hopper, Device::kCuda},
#endif
#ifdef INDEXCACHE_CUDA
    {"cuda", [](const MoeGateUpArgs& args) { return is_bf16(args.gate); }, moe_gate_up_cuda,
     Device::kCuda},
#endif
    {"ref", [](const MoeGateUpArgs&) { return true; }, moe_gate_up_ref},
};

constexpr OpImpl<MoeDownArgs> kDownImpls[] = {
#if defined(INDEXCACHE_CUDA) && !defined(INDEXCACHE_CUDA_EMULATION)
    {"sm90", moe_down_hopper_supported, moe_down_hopper, Device::kCuda},
#endif
#ifdef INDEXCACHE_CUDA
    {"cuda", [](const MoeDownArgs& args) { return is_bf16(args.down); }, moe_down_cuda,
     Device::kCuda},
#endif
    {"ref", [](const MoeDownArgs&) { return true; }, moe_down_ref},
};

void check_matrices(Device device, const ExpertMatrices& matrices, const Weight& shape) {
  CHECK(!matrices.weights.empty());
  CHECK(device == Device::kCpu || matrices.device_weights != nullptr);
  for (const Weight& w : matrices.weights) {
    CHECK(w.dtype == shape.dtype);
    CHECK(w.dtype == DType::kBF16 || w.scale_inv != nullptr);
    CHECK_EQ(w.rows, shape.rows);
    CHECK_EQ(w.cols, shape.cols);
  }
}

void check_rows(const ExpertRows& rows) {
  CHECK_GE(rows.num_rows, 0);
  CHECK(rows.row_begin != nullptr);
}

Cost cost_of(int64_t num_rows, int64_t num_experts, const Weight& w, double num_matrices) {
  const auto rows = static_cast<double>(num_rows), n = static_cast<double>(w.rows),
             k = static_cast<double>(w.cols);
  const double experts = std::min(rows, static_cast<double>(num_experts));
  return {2 * num_matrices * rows * n * k,
          2 * rows * (n + k) + num_matrices * experts * n * k * dtype_bytes(w.dtype)};
}

}  // namespace

std::span<const OpImpl<MoeGateUpArgs>> moe_gate_up_impls() { return kGateUpImpls; }
std::span<const OpImpl<MoeDownArgs>> moe_down_impls() { return kDownImpls; }

bool moe_mlp_takes(const Weight& w, Compute compute) {
  const bool aligned =
      w.rows > 0 && w.cols > 0 && w.rows % 8 == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
  if (w.dtype == DType::kF8E4M3)
    return aligned && compute == Compute::kFP8 && w.cols % 16 == 0 && first_gpu_is_hopper();
  return aligned && compute != Compute::kF32 && w.dtype == DType::kBF16 && w.cols % 8 == 0;
}

void moe_gate_up(Exec& exec, const MoeGateUpArgs& args) {
  check_rows(args.rows);
  check_matrices(exec.device, args.gate, args.gate.weights[0]);
  check_matrices(exec.device, args.up, args.gate.weights[0]);
  CHECK_EQ(args.gate.weights.size(), args.up.weights.size());
  if (args.rows.num_rows == 0) return;
  CHECK(args.x != nullptr && args.tokens != nullptr && args.y != nullptr);
  run_op(exec, "moe_gate_up", kGateUpImpls, args,
         cost_of(args.rows.num_rows, static_cast<int64_t>(args.gate.weights.size()),
                 args.gate.weights[0], 2));
}

void moe_down(Exec& exec, const MoeDownArgs& args) {
  check_rows(args.rows);
  check_matrices(exec.device, args.down, args.down.weights[0]);
  if (args.rows.num_rows == 0) return;
  CHECK(args.x != nullptr && args.y != nullptr);
  run_op(exec, "moe_down", kDownImpls, args,
         cost_of(args.rows.num_rows, static_cast<int64_t>(args.down.weights.size()),
                 args.down.weights[0], 1));
}

}  // namespace indexcache
