// What the implementations of matmul share.
#pragma once

#include "ops/matmul/matmul.h"
#include "tensor/tensor.h"

namespace indexcache {

// fp8 weights carry one scale per block of this many rows and columns.
inline constexpr int64_t kScaleBlock = 128;

// What `compute` means for a product with a matrix of this type.
inline Compute compute_for(Compute compute, DType w) {
  return compute == Compute::kFP8 && w != DType::kF8E4M3 ? Compute::kBF16 : compute;
}

// On a GPU rows up to here share one reading of the weights as they lie, without tensor cores.
inline constexpr int64_t kFewRows = 8;

struct MatmulKernels;

void matmul_ref(Exec& exec, const MatmulArgs& args);
void matmul_vector(const MatmulKernels& kernels, Exec& exec, const MatmulArgs& args);

// Aligned bf16 weights with Compute::kBF16, aligned f32 weights with Compute::kF32.
bool matmul_onednn_supported(const MatmulArgs& args);
// The same on a CPU with tiles, when there are enough rows of x for them.
bool matmul_onednn_tiles_supported(const MatmulArgs& args);
void matmul_onednn(Exec& exec, const MatmulArgs& args);

// Any GPU.
void matmul_cuda(Exec& exec, const MatmulArgs& args);
void matmul_experts_cuda(Exec& exec, const MatmulExpertsArgs& args);
// NVIDIA's library, where it is installed, for products of many rows.
bool matmul_cublaslt_supported(const MatmulArgs& args);
void matmul_cublaslt(Exec& exec, const MatmulArgs& args);
// Hopper's fp8 tensor cores with Compute::kFP8, for products of many rows.
bool matmul_fp8_hopper_supported(const MatmulArgs& args);
void matmul_fp8_hopper(Exec& exec, const MatmulArgs& args);

// Best first. `ref` is last.
std::span<const OpImpl<MatmulArgs>> matmul_impls();
std::span<const OpImpl<MatmulExpertsArgs>> matmul_experts_impls();

}  // namespace indexcache
