// y = x w^T for few rows of x, where reading w is what takes the time: a block takes 16 rows of w,
// reads each once, straight to registers as the left operand of the tensor cores, and multiplies it
// with up to 8 kTiles rows of x. Its warps share the sum over k, and add their parts in order.
//
// The sum over k may go in any order, so a lane takes 16 consecutive bytes of a row: of lane l,
// g = l / 4 and c = l % 4, elements [8c, 8c + 8) of 32 of rows g and g + 8 of w and of row g of x.
// Its four pairs are the two pairs that the lane gives to each of two mma.
//
// w bf16, rows dense, k a multiple of 8, 16-byte aligned; x bf16 or f32 (then rounded), 16-byte
// aligned with a stride that keeps it so.
#pragma once

#include "ops/kit/mma.cuh"

namespace indexcache {

inline constexpr int kNarrowThreads = 256, kNarrowWarps = kNarrowThreads / kWarpLanes;
inline constexpr int kNarrowCols = 16, kNarrowTileRows = 8;
inline constexpr int kNarrowDepth = 32;  // of k, that a warp takes at a time

// Rows of x: row r is `ids[r]` of the matrix, or r itself without ids.
struct NarrowInput {
  const float* f32 = nullptr;      // one of the two
  const uint16_t* bf16 = nullptr;  //
  int64_t ld = 0;
  const int32_t* ids = nullptr;
};

__device__ __forceinline__ uint4 narrow_input(const NarrowInput& x, int64_t row, int64_t col) {
  if (x.ids != nullptr) row = x.ids[row];
  if (x.bf16 != nullptr) return *reinterpret_cast<const uint4*>(x.bf16 + row * x.ld + col);
  const float4* at = reinterpret_cast<const float4*>(x.f32 + row * x.ld + col);
  const float4 low = at[0], high = at[1];
  return make_uint4(bf16_pair(low.x, low.y), bf16_pair(low.z, low.w), bf16_pair(high.x, high.y),
                    bf16_pair(high.z, high.w));
}

// Rows [row, row + 8 kTiles), of which those below `end` exist, with rows [col, col + 16) of each
// of the matrices w[i] [n, k]: calls store(row, col, values of the matrices) once for each that
// exists.
template <int kTiles, int kMatrices, class Store>
__device__ __forceinline__ void narrow_products(const NarrowInput& x, int64_t row, int64_t end,
                                                const uint8_t* const (&w)[kMatrices], int64_t col,
                                                int64_t n, int64_t k, const Store& store) {
  // Loads in flight are what makes reading fast.
  constexpr int kAhead = kTiles * kMatrices <= 2 ? 4 : 2;
  constexpr int kStride = kNarrowWarps * kNarrowDepth;
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int g = lane / 4, c = lane % 4;
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  float sums[kMatrices][kTiles][4] = {};
  for (int64_t begin = warp * kNarrowDepth; begin < k; begin += kAhead * kStride) {
    uint4 left[kAhead][kMatrices][2];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t at = begin + a * kStride + 8 * c;
#pragma unroll
      for (int i = 0; i < 2 * kMatrices; ++i) {
        const int64_t from = col + g + i % 2 * 8;
        left[a][i / 2][i % 2] =
            from < n && at < k ? *reinterpret_cast<const uint4*>(w[i / 2] + 2 * (from * k + at))
                               : nothing;
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t at = begin + a * kStride + 8 * c;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t from = row + tile * kNarrowTileRows + g;
        const uint4 right = from < end && at < k ? narrow_input(x, from, at) : nothing;
        const uint32_t first[2] = {right.x, right.y}, second[2] = {right.z, right.w};
#pragma unroll
        for (int i = 0; i < kMatrices; ++i) {
          const uint4 top = left[a][i][0], bottom = left[a][i][1];
          const uint32_t a1[4] = {top.x, bottom.x, top.y, bottom.y},
                         a2[4] = {top.z, bottom.z, top.w, bottom.w};
          mma_bf16(sums[i][tile], a1, first);
          mma_bf16(sums[i][tile], a2, second);
        }
      }
    }
  }
  __shared__ __align__(16) float parts[kMatrices][kNarrowWarps][kWarpLanes][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) parts[i][warp][lane][j] = sums[i][tile][j];
    }
    __syncthreads();
    const int own_col = threadIdx.x % kNarrowCols, own_row = threadIdx.x / kNarrowCols;
    const int64_t to_row = row + tile * kNarrowTileRows + own_row;
    if (own_row >= kNarrowTileRows || to_row >= end || col + own_col >= n) continue;
    float values[kMatrices] = {};
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) {
      for (int part = 0; part < kNarrowWarps; ++part)
        values[i] += parts[i][part][own_col % 8 * 4 + own_row / 2][own_col / 8 * 2 + own_row % 2];
    }
    store(to_row, col + own_col, values);
  }
}

}  // namespace indexcache
