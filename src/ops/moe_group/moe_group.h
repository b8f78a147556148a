// Sorts the (token, expert) pairs that routing chose by expert, so that each expert's tokens are
// consecutive rows of one product.
//
// Pair i = token * num_experts_per_tok + j goes to expert experts[i], row slots[i]:
//   row_begin[e] = the number of pairs whose expert is below e
//   slots[i]     = row_begin[experts[i]] + the number of pairs before i with the same expert
//   slot_tokens[slots[i]] = i / num_experts_per_tok
//
// Integers: parity with ref is exact. Cost: no flops; every pair read once and written twice.
#pragma once

#include <span>

#include "ops/kit/exec.h"

namespace indexcache {

struct MoeGroupArgs {
  const int32_t* experts = nullptr;  // [num_tokens, num_experts_per_tok], in [0, n_routed_experts)
  int64_t num_tokens = 0;
  int64_t num_experts_per_tok = 0;
  int64_t n_routed_experts = 0;
  int32_t* row_begin = nullptr;    // out [n_routed_experts + 1]
  int32_t* slots = nullptr;        // out [num_tokens, num_experts_per_tok]
  int32_t* slot_tokens = nullptr;  // out [num_tokens * num_experts_per_tok]
};

void moe_group(Exec& exec, const MoeGroupArgs& args);

void moe_group_ref(Exec& exec, const MoeGroupArgs& args);
void moe_group_cuda(Exec& exec, const MoeGroupArgs& args);

// Best first. `ref` is last.
std::span<const OpImpl<MoeGroupArgs>> moe_group_impls();

}  // namespace indexcache
