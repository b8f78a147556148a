// The implementations of sparse_mla, for its table, tests and benchmarks.
#pragma once

#include "ops/sparse_mla/sparse_mla.h"

namespace indexcache {

void sparse_mla_ref(Exec& exec, const SparseMlaArgs& args);

// Best first. `ref` is last.
std::span<const OpImpl<SparseMlaArgs>> sparse_mla_impls();

}  // namespace indexcache
