// For kernels in which one warp makes one row of a cache. A lane holds four neighbours of every 128
// elements: those from 128 b + 4 lane on.
#pragma once

#include "ops/kit/cuda.cuh"

namespace indexcache {

inline constexpr int kWarpElements = 4 * kWarpLanes;
inline constexpr unsigned kRowWarps = 4;  // of a block
// The most elements of a row that a warp takes.
inline constexpr int64_t kMaxWarpRow = 1024;

// Elements i to i + 3 of n, 0 beyond. `vector`: x and n allow 16 bytes at once.
__device__ __forceinline__ void load_quad(const float* x, int i, int n, bool vector,
                                          float (&quad)[4]) {
  if (vector && i < n) {
    const float4 all = *reinterpret_cast<const float4*>(x + i);
    quad[0] = all.x, quad[1] = all.y, quad[2] = all.z, quad[3] = all.w;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) quad[e] = i + e < n ? x[i + e] : 0.0f;
}

// Into elements i to i + 3 of n of a cached row. `vector`: the row and n allow it at once.
template <DType dtype>
__device__ __forceinline__ void store_quad(uint8_t* row, int i, int n, bool vector,
                                           const float (&quad)[4], float scale) {
  if constexpr (dtype == DType::kF32) {
    float* to = reinterpret_cast<float*>(row) + i;
    if (vector && i < n) {
      *reinterpret_cast<float4*>(to) = make_float4(quad[0], quad[1], quad[2], quad[3]);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e < n) to[e] = quad[e];
    }
  } else if constexpr (dtype == DType::kBF16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row) + i;
    if (vector && i < n) {
      *reinterpret_cast<uint2*>(to) =
          uint2{bf16_pair(quad[0], quad[1]), bf16_pair(quad[2], quad[3])};
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e < n) to[e] = static_cast<uint16_t>(f32_to_bf16_bits(quad[e]));
    }
  } else {
    uint8_t bytes[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bytes[e] = dtype == DType::kI8 ? static_cast<uint8_t>(quantised(quad[e], scale))
                                     : quantised_fp8(quad[e], scale);
    }
    if (vector && i < n) {
      *reinterpret_cast<uint32_t*>(row + i) =
          bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i + e < n) row[i + e] = bytes[e];
    }
  }
}

inline bool is_aligned(const void* data, int64_t stride_bytes, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(alignment) == 0 &&
         stride_bytes % alignment == 0;
}

}  // namespace indexcache
