// Queries and keys of the indexer to e4m3, one scale for each vector of 128. Memory bound: a vector
// is read once (512 bytes) and written once (132).
#include <cuda_fp8.h>

#include "device/previous_kernel.cuh"
#include "ops/index_select/index_select_sm90.cuh"
#include "ops/index_select/scores_sm90.cuh"

namespace indexcache::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// By one warp, four numbers a lane. A vector with NaN or infinity gets the scale NaN and zeros, so
// that whatever is made from it is NaN.
__device__ __forceinline__ uint32_t quantise(float4 x, float& scale) {
  float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  // Bits of a magnitude are ordered like it, and those of NaN are above all.
  uint32_t bits = __float_as_uint(largest);
  if (x.x != x.x || x.y != x.y || x.z != x.z || x.w != x.w) bits = 0x7FC00000u;
  bits = __reduce_max_sync(0xFFFFFFFFu, bits);
  if (bits >= 0x7F800000u) {
    scale = __uint_as_float(0x7FC00000u);
    return 0;
  }
  largest = __uint_as_float(bits);
  scale = largest / 448.0f;
  if (scale == 0) return 0;
  const float4 y = {x.x / scale, x.y / scale, x.z / scale, x.w / scale};
  const __nv_fp8x2_storage_t low = __nv_cvt_float2_to_fp8x2({y.x, y.y}, __NV_SATFINITE, __NV_E4M3);
  const __nv_fp8x2_storage_t high = __nv_cvt_float2_to_fp8x2({y.z, y.w}, __NV_SATFINITE, __NV_E4M3);
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

__global__ void __launch_bounds__(kThreads)
    quantise_queries_kernel(const float* x, const float* weights, int64_t num_vectors,
                            int num_heads, int padded_heads, uint8_t* q8, float* out_weights) {
  wait_for_previous();
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (vector >= num_vectors) return;
  const int64_t token = vector / padded_heads;
  const int head = static_cast<int>(vector % padded_heads);
  uint32_t packed = 0;
  float weight = 0;
  if (head < num_heads) {
    const int64_t from = token * num_heads + head;
    float scale;
    packed = quantise(reinterpret_cast<const float4*>(x + from * kIndexDim)[lane], scale);
    weight = weights[from] * scale;
  }
  reinterpret_cast<uint32_t*>(q8 + vector * kIndexDim)[lane] = packed;
  if (lane == 0) out_weights[vector] = weight;
}

__global__ void __launch_bounds__(kThreads)
    store_index_keys_kernel(const float* keys, const SeqSpan* seqs, int num_seqs, int num_tokens,
                            uint8_t* key_base, int64_t page_bytes) {
  wait_for_previous();
  const int token = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (token >= num_tokens) return;
  const SeqSpan seq = seqs[sequence_of(seqs, num_seqs, token)];
  const int64_t position = seq.first_position + token - seq.token_begin;
  uint8_t* page = key_base + seq.pages[position / kPageTokens] * page_bytes;
  const int64_t row = position % kPageTokens;
  float scale;
  const uint32_t packed =
      quantise(reinterpret_cast<const float4*>(keys + int64_t{token} * kIndexDim)[lane], scale);
  reinterpret_cast<uint32_t*>(page + row * kIndexDim)[lane] = packed;
  if (lane == 0) reinterpret_cast<float*>(page + kPageTokens * kIndexDim)[row] = scale;
}

}  // namespace

cudaError_t quantise_queries(const float* x, const float* weights, int num_tokens, int num_heads,
                             int padded_heads, uint8_t* q8, float* out_weights,
                             cudaStream_t stream) {
  const int64_t num_vectors = static_cast<int64_t>(num_tokens) * padded_heads;
  if (num_vectors == 0) return cudaSuccess;
  return start_kernel(quantise_queries_kernel,
                      dim3(static_cast<unsigned>((num_vectors + kWarps - 1) / kWarps)),
                      dim3(kThreads), 0, stream, true, x, weights, num_vectors, num_heads,
                      padded_heads, q8, out_weights);
}

cudaError_t store_index_keys(const float* keys, const SeqSpan* seqs, int num_seqs, int num_tokens,
                             uint8_t* key_base, int64_t page_bytes, cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  return start_kernel(
      store_index_keys_kernel, dim3(static_cast<unsigned>((num_tokens + kWarps - 1) / kWarps)),
      dim3(kThreads), 0, stream, true, keys, seqs, num_seqs, num_tokens, key_base, page_bytes);
}

}  // namespace indexcache::sm90
