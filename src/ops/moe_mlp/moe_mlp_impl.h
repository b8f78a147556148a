// What the implementations of moe_gate_up and moe_down share.
#pragma once

#include "ops/moe_mlp/moe_mlp.h"

namespace indexcache {

void moe_gate_up_ref(Exec& exec, const MoeGateUpArgs& args);
void moe_down_ref(Exec& exec, const MoeDownArgs& args);

// Any GPU since Ampere. Best for few rows, whatever the GPU.
void moe_gate_up_cuda(Exec& exec, const MoeGateUpArgs& args);
void moe_down_cuda(Exec& exec, const MoeDownArgs& args);

// Hopper: bf16 where experts have tens of rows or more, e4m3 always.
bool moe_gate_up_hopper_supported(const MoeGateUpArgs& args);
bool moe_down_hopper_supported(const MoeDownArgs& args);
void moe_gate_up_hopper(Exec& exec, const MoeGateUpArgs& args);
void moe_down_hopper(Exec& exec, const MoeDownArgs& args);

}  // namespace indexcache
