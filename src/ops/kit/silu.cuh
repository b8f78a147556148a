// silu(z) = z / (1 + exp(-z)) as silu_mul's contract has it.
#pragma once

#include "ops/kit/cuda.cuh"

namespace indexcache {

__device__ __forceinline__ float silu(float z) {
  // Below, exp overflows; the limit is 0.
  return z < -87.3f ? 0.0f : z / (1 + expf(-z));
}

}  // namespace indexcache
