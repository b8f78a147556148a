// How the kernels of matmul find their product: from a list that is part of the launch, or, for
// experts, from row numbers that only the GPU knows.
#pragma once

#include "ops/kit/expert_tiles.cuh"
#include "ops/matmul/matmul.h"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {

// y [m, n] from x [m, k] and w [n, k].
struct CudaProduct {
  const float* x;  // or x16
  float* y;        // or y16
  const uint8_t* w;
  const float* scale_inv;
  int64_t ldx, ldy;
  int32_t m, n, k;
  const uint16_t* x16;
  uint16_t* y16;
};

// Block (i, j, z) computes columns from i * kTileN and rows from `row` of a product; m is 0 where
// there is nothing to do.
struct CudaTile {
  CudaProduct product;
  int64_t row;
};

// Kernel parameters end at 4 KiB.
inline constexpr int kProductsPerLaunch = 32;

struct ListedProducts {
  CudaProduct products[kProductsPerLaunch];

  template <int kRows>
  __device__ CudaTile tile() const {
    return {products[blockIdx.z], static_cast<int64_t>(blockIdx.y) * kRows};
  }
};

// Blocks along y are tiles of rows of all experts.
struct ExpertProducts {
  ExpertProduct product;  // weights in GPU memory
  const int32_t* row_begin;
  int32_t num_experts, n, k;

  template <int kRows>
  __device__ CudaTile tile() const {
    const ExpertTile found = find_expert_tile(row_begin, num_experts, kRows, blockIdx.y);
    CudaTile tile = {};
    if (found.expert < 0) return tile;
    const int64_t begin = row_begin[found.expert];
    const Weight& w = product.device_weights[found.expert];
    tile.product = {product.x + begin * product.ldx,
                    product.y + begin * product.ldy,
                    w.data,
                    w.scale_inv,
                    product.ldx,
                    product.ldy,
                    static_cast<int32_t>(found.end - begin),
                    n,
                    k,
                    nullptr,
                    nullptr};
    tile.row = found.row - begin;
    return tile;
  }
};

}  // namespace indexcache
