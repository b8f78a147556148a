// What the kernels of our ops share: exact conversions of checkpoint types, sums over a warp or a
// block, and the way from a token to its row of the cache.
#pragma once

#include <cstdint>

#include "device/cuda.cuh"
#include "ops/kit/paged.h"
#include "tensor/dtype.h"

namespace indexcache {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;
inline constexpr int kWarpLanes = 32;

template <class T>
__host__ __device__ constexpr T ceil_div_cuda(T a, T b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }
__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7FC00000u); }

// --- types: the same bits as tensor/dtype.h ---

__device__ __forceinline__ float bf16_bits_to_f32(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ uint32_t f32_to_bf16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ float rounded_to_bf16(float value) {
  return bf16_bits_to_f32(f32_to_bf16_bits(value));
}

// Two in one register, the first in the low half, as mma takes them.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  return f32_to_bf16_bits(low) | (f32_to_bf16_bits(high) << 16);
}

// Moved to the exponent of f32 and multiplied by what the biases differ: exact, subnormals too.
__device__ __forceinline__ float f16_bits_to_f32(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7FFFu) << 13;
  const uint32_t value = rest >= 0x0F800000u  // infinity and NaN
                             ? rest | 0x7F800000u
                             : __float_as_uint(__uint_as_float(rest) * 0x1p112f);
  return __uint_as_float(sign | value);
}

__device__ __forceinline__ float f8e4m3_bits_to_f32(uint32_t bits) {
  const uint32_t sign = (bits & 0x80u) << 24, rest = bits & 0x7Fu;
  const uint32_t value =
      rest == 0x7Fu ? 0x7FC00000u : __float_as_uint(__uint_as_float(rest << 20) * 0x1p120f);
  return __uint_as_float(sign | value);
}

// Element `i` of memory that may be unaligned.
template <DType dtype>
__device__ __forceinline__ float element_at(const uint8_t* data, int64_t i) {
  if constexpr (dtype == DType::kF8E4M3) {
    return f8e4m3_bits_to_f32(data[i]);
  } else if constexpr (dtype == DType::kF32) {
    const uint8_t* at = data + 4 * i;
    if (reinterpret_cast<uintptr_t>(data) % 4 == 0) return *reinterpret_cast<const float*>(at);
    return __uint_as_float(static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8 |
                           static_cast<uint32_t>(at[2]) << 16 | static_cast<uint32_t>(at[3]) << 24);
  } else {
    const uint8_t* at = data + 2 * i;
    const uint32_t bits = reinterpret_cast<uintptr_t>(data) % 2 == 0
                              ? *reinterpret_cast<const uint16_t*>(at)
                              : static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8;
    return dtype == DType::kBF16 ? bf16_bits_to_f32(bits) : f16_bits_to_f32(bits);
  }
}

// Calls body.template operator()<dtype>() for the type of a weight.
template <class Body>
void for_weight_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body.template operator()<DType::kF32>();
    case DType::kF16:
      return body.template operator()<DType::kF16>();
    case DType::kBF16:
      return body.template operator()<DType::kBF16>();
    case DType::kF8E4M3:
      return body.template operator()<DType::kF8E4M3>();
    default:
      CHECK(false);
  }
}

// --- sums, in an order that depends on the block size alone ---

__device__ __forceinline__ float warp_sum(float value) {
  for (int bits = kWarpLanes / 2; bits > 0; bits /= 2)
    value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int bits = kWarpLanes / 2; bits > 0; bits /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

// Every thread gets the sum. A block of one dimension, whole warps.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warp[kWarpLanes];
  value = warp_sum(value);
  __syncthreads();  // of an earlier sum
  if (threadIdx.x % kWarpLanes == 0) of_warp[threadIdx.x / kWarpLanes] = value;
  __syncthreads();
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpLanes; ++warp) sum += of_warp[warp];
  return sum;
}

// What lies before this thread in the block, and all of it.
struct BlockScan {
  uint32_t before, total;
};

__device__ __forceinline__ BlockScan block_scan(uint32_t value) {
  __shared__ uint32_t of_warp[kWarpLanes];
  const unsigned lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  uint32_t sum = value;
  for (unsigned delta = 1; delta < kWarpLanes; delta *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, sum, delta);
    if (lane >= delta) sum += left;
  }
  __syncthreads();  // of an earlier scan
  if (lane == kWarpLanes - 1) of_warp[warp] = sum;
  __syncthreads();
  BlockScan scan{sum - value, 0};
  for (unsigned w = 0; w < blockDim.x / kWarpLanes; ++w) {
    if (w < warp) scan.before += of_warp[w];
    scan.total += of_warp[w];
  }
  return scan;
}

// --- int8 and e4m3 rows, as ops/kit/int8_rows.h and fp8_rows.h make them ---

// The larger of `largest` and what decides the scale of a row with x in it: infinity stands for all
// that is not finite, because fmaxf would drop a NaN.
__device__ __forceinline__ float with_magnitude(float largest, float x) {
  const float size = fabsf(x);
  return fmaxf(largest, size < -minus_infinity() ? size : -minus_infinity());
}

__device__ __forceinline__ float scale_for(float largest, float range) {
  return largest < -minus_infinity() ? largest / range : quiet_nan();
}

// The scale of a row that the whole block reads, with the largest number of the row becoming
// `range`; every thread gets it.
__device__ __forceinline__ float block_row_scale(const float* x, int64_t n, float range) {
  __shared__ float of_warp[kWarpLanes];
  float largest = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) largest = with_magnitude(largest, x[i]);
  largest = warp_max(largest);
  __syncthreads();  // of an earlier row
  if (threadIdx.x % kWarpLanes == 0) of_warp[threadIdx.x / kWarpLanes] = largest;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarpLanes; ++warp)
    largest = fmaxf(largest, of_warp[warp]);
  return scale_for(largest, range);
}

__device__ __forceinline__ int8_t quantised(float x, float scale) {
  if (!(scale > 0)) return 0;
  return static_cast<int8_t>(nearbyintf(fminf(fmaxf(x / scale, -127.0f), 127.0f)));
}

// f32_to_f8e4m3 of tensor/dtype.h for numbers; no GPU before Hopper has an instruction for it.
__device__ __forceinline__ uint8_t f32_to_f8e4m3_bits(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80u;
  const float magnitude = fabsf(value);
  if (magnitude >= 448.0f) return static_cast<uint8_t>(sign | 0x7Eu);
  if (magnitude < 0x1p-6f)  // subnormal; 8 is the lowest normal number
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(nearbyintf(magnitude * 0x1p9f)));
  const uint32_t rest = bits & 0x7FFFFFFFu, rounded = rest + 0x7FFFFu + (rest >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

__device__ __forceinline__ uint8_t quantised_fp8(float x, float scale) {
  if (!(scale > 0)) return 0;
  return f32_to_f8e4m3_bits(x / scale);
}

// Element e of a latent row in fp8 (ops/kit/paged.h).
__device__ __forceinline__ float fp8_latent_at(const uint8_t* row, int fp8_elements, int e) {
  const uint8_t* scales = row + fp8_elements;
  if (e < fp8_elements)
    return f8e4m3_bits_to_f32(row[e]) *
           reinterpret_cast<const float*>(scales)[e / static_cast<int>(kFp8Block)];
  const uint8_t* rest = scales + fp8_elements / static_cast<int>(kFp8Block) * 4;
  return bf16_bits_to_f32(reinterpret_cast<const uint16_t*>(rest)[e - fp8_elements]);
}

// --- tokens of a ragged batch ---

// The run that row `token` belongs to: the last one that begins at or before it.
__device__ __forceinline__ int find_seq(const SeqSpan* seqs, int num_seqs, int64_t token) {
  int low = 0, high = num_seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (seqs[middle].token_begin <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The same by a whole warp: one look for 32 runs.
__device__ __forceinline__ int warp_find_seq(const SeqSpan* seqs, int num_seqs, int64_t token) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  int begun = 0;
  for (int first = 0; first < num_seqs; first += kWarpLanes) {
    const bool has = first + lane < num_seqs && seqs[first + lane].token_begin <= token;
    begun += __popc(__ballot_sync(kAllLanes, has));
  }
  return begun - 1;
}

__device__ __forceinline__ uint8_t* paged_row(const PagedRows& rows, int64_t row_bytes,
                                              const int32_t* pages, int64_t position) {
  return rows.base + pages[position / kPageTokens] * rows.page_bytes +
         position % kPageTokens * row_bytes;
}

__device__ __forceinline__ float* paged_scale(const PagedRows& rows, const int32_t* pages,
                                              int64_t position) {
  return reinterpret_cast<float*>(rows.base + pages[position / kPageTokens] * rows.page_bytes +
                                  kPageTokens * rows.row_elements) +
         position % kPageTokens;
}

inline dim3 blocks_for(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>(ceil_div_cuda(items, per_block)));
}

}  // namespace indexcache
