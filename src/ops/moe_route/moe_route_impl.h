// What the implementations of moe_route share.
#pragma once

#include "ops/moe_route/moe_route.h"

namespace indexcache {

void moe_route_ref(Exec& exec, const MoeRouteArgs& args);
bool moe_route_cuda_supported(const MoeRouteArgs& args);  // up to some 1300 experts
void moe_route_cuda(Exec& exec, const MoeRouteArgs& args);

// Best first. `ref` is last.
std::span<const OpImpl<MoeRouteArgs>> moe_route_impls();

}  // namespace indexcache
