// Checks the contract of matmul and chooses an implementation.
#include "ops/matmul/matmul.h"

#include "base/checked.h"
#include "device/cpu_features.h"
#include "ops/matmul/matmul_impl.h"
#include "ops/matmul/matmul_kernels.h"

namespace indexcache {

namespace {

// No CPU multiplies e4m3; there kFP8 is ref's alone, for tests.
bool is_for_cpu(const MatmulArgs& args) { return args.compute != Compute::kFP8; }

const OpImpl<MatmulArgs> kMatmulImpls[] = {
    {"onednn_tiles", matmul_onednn_tiles_supported, matmul_onednn},
    {"avx512bf16",
     [](const MatmulArgs& args) { return cpu_features().avx512_bf16 && is_for_cpu(args); },
     [](Exec& exec, const MatmulArgs& args) {
       matmul_vector(avx512bf16::kMatmulKernels, exec, args);
     }},
    {"avx512", [](const MatmulArgs& args) { return cpu_features().avx512 && is_for_cpu(args); },
     [](Exec& exec, const MatmulArgs& args) { matmul_vector(avx512::kMatmulKernels, exec, args); }},
    {"avx2", [](const MatmulArgs& args) { return cpu_features().avx2 && is_for_cpu(args); },
     [](Exec& exec, const MatmulArgs& args) { matmul_vector(avx2::kMatmulKernels, exec, args); }},
    {"onednn", matmul_onednn_supported, matmul_onednn},
#if defined(INDEXCACHE_CUDA) && !defined(INDEXCACHE_CUDA_EMULATION)
    {"sm90_fp8", matmul_fp8_hopper_supported, matmul_fp8_hopper, Device::kCuda},
    {"cublaslt", matmul_cublaslt_supported, matmul_cublaslt, Device::kCuda},
#endif
#ifdef INDEXCACHE_CUDA
    {"cuda", [](const MatmulArgs&) { return true; }, matmul_cuda, Device::kCuda},
#endif
    {"ref", [](const MatmulArgs&) { return true; }, matmul_ref},
};

void check_group(const Exec& exec, const MatmulArgs& args, const MatmulGroup& group) {
  const Weight& w = group.w;
  CHECK_GE(group.m, 0);
  CHECK_GE(w.rows, 0);
  CHECK_GE(w.cols, 0);
  CHECK(w.dtype == DType::kF32 || w.dtype == DType::kF16 || w.dtype == DType::kBF16 ||
        w.dtype == DType::kF8E4M3);
  if (group.m == 0 || w.rows == 0) return;
  CHECK((group.y != nullptr) != (group.y16 != nullptr));
  if (group.x16 != nullptr || group.y16 != nullptr)
    CHECK(exec.device == Device::kCuda && args.compute != Compute::kF32);
  CHECK(group.y16 == nullptr || !args.accumulate);
  if (group.m > 1) {
    CHECK_GE(group.ldx, w.cols);
    CHECK_GE(group.ldy, w.rows);
  }
  if (w.cols == 0) return;
  CHECK((group.x != nullptr) != (group.x16 != nullptr));
  CHECK(w.data != nullptr);
  CHECK(w.dtype != DType::kF8E4M3 || w.scale_inv != nullptr);
}

}  // namespace

std::span<const OpImpl<MatmulArgs>> matmul_impls() { return kMatmulImpls; }

Cost matmul_cost(const MatmulArgs& args) {
  Cost cost;
  for (const MatmulGroup& group : args.groups) {
    const auto m = static_cast<double>(group.m);
    const auto n = static_cast<double>(group.w.rows);
    const auto k = static_cast<double>(group.w.cols);
    if (group.m == 0) continue;
    cost.flops += 2 * m * n * k;
    cost.bytes += m * k * (group.x16 != nullptr ? 2 : 4) +
                  m * n *
                      (group.y16 != nullptr ? 2
                       : args.accumulate    ? 8
                                            : 4) +
                  n * k * dtype_bytes(group.w.dtype);
  }
  return cost;
}

void matmul(Exec& exec, const MatmulArgs& args_in) {
  MatmulArgs args = args_in;
  args.batch_invariant = exec.batch_invariant;
  for (const MatmulGroup& group : args.groups) check_group(exec, args, group);
  run_op(exec, "matmul", kMatmulImpls, args, exec.profile != nullptr ? matmul_cost(args) : Cost{});
}

}  // namespace indexcache
