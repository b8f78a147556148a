// How the kernels of matmul find their product: from a list that is part of the launch, or, for
// experts, from row numbers that only the GPU knows.
#pragma once

#include "ops/kit/cuda.cuh"
#include "ops/matmul/matmul.h"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {

// y [m, n] from x [m, k] and w [n, k].
struct CudaProduct {
  const float* x;
  float* y;
  const uint8_t* w;
  const float* scale_inv;
  int64_t ldx, ldy;
  int32_t m, n, k;
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

// Blocks along y are tiles of rows of all experts, one expert after the other. Since a tile never
// holds rows of two experts, there are at most num_rows / kRows + num_experts.
struct ExpertProducts {
  ExpertProduct product;  // weights in GPU memory
  const int32_t* row_begin;
  int32_t num_experts, n, k;

  template <int kRows>
  __device__ CudaTile tile() const {
    __shared__ int32_t found_expert, found_tile;
    if (threadIdx.x == 0) found_expert = -1;
    __syncthreads();
    uint32_t tiles_before = 0;
    for (int32_t first = 0; first < num_experts; first += static_cast<int32_t>(blockDim.x)) {
      const int32_t e = first + static_cast<int32_t>(threadIdx.x);
      const int32_t rows = e < num_experts ? row_begin[e + 1] - row_begin[e] : 0;
      const uint32_t tiles = static_cast<uint32_t>(ceil_div_cuda(rows, kRows));
      const BlockScan scan = block_scan(tiles);
      const uint32_t begin = tiles_before + scan.before;
      if (blockIdx.y >= begin && blockIdx.y < begin + tiles) {
        found_expert = e;
        found_tile = static_cast<int32_t>(blockIdx.y - begin);
      }
      tiles_before += scan.total;
    }
    __syncthreads();
    CudaTile tile = {};
    if (found_expert < 0) return tile;
    const int64_t begin = row_begin[found_expert];
    const Weight& w = product.device_weights[found_expert];
    tile.product = {product.x + begin * product.ldx,
                    product.y + begin * product.ldy,
                    w.data,
                    w.scale_inv,
                    product.ldx,
                    product.ldy,
                    static_cast<int32_t>(row_begin[found_expert + 1] - begin),
                    n,
                    k};
    tile.row = static_cast<int64_t>(found_tile) * kRows;
    return tile;
  }
};

}  // namespace indexcache
