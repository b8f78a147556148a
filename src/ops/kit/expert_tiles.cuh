// The rows of a mixture of experts cut into tiles, in order of experts: a tile holds rows of one
// expert, so num_rows rows make at most num_rows / tile_rows + num_experts of them. How many rows
// an expert has only the GPU knows (row_begin [num_experts + 1], ascending).
#pragma once

#include "ops/kit/cuda.cuh"

namespace indexcache {

struct ExpertTile {
  int32_t expert = -1;       // -1: there are fewer tiles
  int32_t row = 0, end = 0;  // its first row, and where the expert's rows end
};

// Tile number `wanted`; every thread of the block gets it. A block of one dimension, whole warps.
__device__ __forceinline__ ExpertTile find_expert_tile(const int32_t* row_begin,
                                                       int32_t num_experts, int32_t tile_rows,
                                                       uint32_t wanted) {
  __shared__ ExpertTile found;
  __syncthreads();  // of an earlier search
  if (threadIdx.x == 0) found = ExpertTile{};
  __syncthreads();
  uint32_t tiles_before = 0;
  for (int32_t first = 0; first < num_experts; first += static_cast<int32_t>(blockDim.x)) {
    const int32_t e = first + static_cast<int32_t>(threadIdx.x);
    const int32_t begin = e < num_experts ? row_begin[e] : 0,
                  end = e < num_experts ? row_begin[e + 1] : 0;
    const uint32_t tiles = static_cast<uint32_t>(ceil_div_cuda(end - begin, tile_rows));
    const BlockScan scan = block_scan(tiles);
    const uint32_t own = tiles_before + scan.before;
    if (wanted >= own && wanted < own + tiles)
      found = {e, begin + static_cast<int32_t>(wanted - own) * tile_rows, end};
    tiles_before += scan.total;
  }
  __syncthreads();
  return found;
}

}  // namespace indexcache
