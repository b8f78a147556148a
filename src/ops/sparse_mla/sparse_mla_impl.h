// The implementations of sparse_mla, for its table, tests and benchmarks.
#pragma once

#include "ops/sparse_mla/sparse_mla.h"

namespace indexcache {

void sparse_mla_ref(Exec& exec, const SparseMlaArgs& args);
// GPUs of compute capability 9.0: bf16 or fp8 rows of 512 + 64.
bool sparse_mla_hopper_supported(const SparseMlaArgs& args);
void sparse_mla_hopper(Exec& exec, const SparseMlaArgs& args);
bool sparse_mla_cuda_supported(const SparseMlaArgs& args);  // rows of up to 790 elements
void sparse_mla_cuda(Exec& exec, const SparseMlaArgs& args);
bool sparse_mla_cuda_mma_supported(const SparseMlaArgs& args);  // bf16 or fp8, value_dim 512 or 128
void sparse_mla_cuda_mma(Exec& exec, const SparseMlaArgs& args);

// Best first. `ref` is last.
std::span<const OpImpl<SparseMlaArgs>> sparse_mla_impls();

}  // namespace indexcache
