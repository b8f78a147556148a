#include "ops/rms_norm/rms_norm.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 256;
constexpr int kHeld = 4;  // quadruples of a row that a thread keeps

__device__ __forceinline__ void store(const RmsNormArgs& args, int64_t i, float value) {
  if (args.y != nullptr) args.y[blockIdx.x * args.ldy + i] = value;
  if (args.y16 != nullptr)
    args.y16[blockIdx.x * args.row_elements + i] = static_cast<uint16_t>(f32_to_bf16_bits(value));
}

__device__ __forceinline__ float scale_of(float squares, const RmsNormArgs& args) {
  return 1 / sqrtf(block_sum(squares) / static_cast<float>(args.row_elements) + args.eps);
}

// One block a row. Every element is read and written by one thread, so y may be x.
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormArgs args) {
  wait_for_previous();
  const float* x = args.x + blockIdx.x * args.ldx;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads) squares += x[i] * x[i];
  const float scale = scale_of(squares, args);
  for (int64_t i = threadIdx.x; i < args.row_elements; i += kThreads)
    store(args, i, x[i] * scale * args.weight[i]);
}

// The same for aligned rows of at most 4 kHeld kThreads elements, which are read once.
__global__ void __launch_bounds__(kThreads) rms_norm_held_kernel(RmsNormArgs args) {
  wait_for_previous();
  const float4* x = reinterpret_cast<const float4*>(args.x + blockIdx.x * args.ldx);
  const float4* weight = reinterpret_cast<const float4*>(args.weight);
  const int quads = static_cast<int>(args.row_elements / 4);
  float4 held[kHeld], factors[kHeld];
  float squares = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * static_cast<int>(kThreads);
    if (i >= quads) continue;
    held[j] = x[i];
    factors[j] = weight[i];
    squares += held[j].x * held[j].x + held[j].y * held[j].y + held[j].z * held[j].z +
               held[j].w * held[j].w;
  }
  const float scale = scale_of(squares, args);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * static_cast<int>(kThreads);
    if (i >= quads) continue;
    const float4 y =
        make_float4(held[j].x * scale * factors[j].x, held[j].y * scale * factors[j].y,
                    held[j].z * scale * factors[j].z, held[j].w * scale * factors[j].w);
    if (args.y != nullptr) reinterpret_cast<float4*>(args.y + blockIdx.x * args.ldy)[i] = y;
    if (args.y16 != nullptr)
      reinterpret_cast<uint2*>(args.y16 + blockIdx.x * args.row_elements)[i] =
          uint2{bf16_pair(y.x, y.y), bf16_pair(y.z, y.w)};
  }
}

bool is_aligned(const void* data, int64_t stride_bytes, uintptr_t alignment) {
  return reinterpret_cast<uintptr_t>(data) % alignment == 0 &&
         static_cast<uintptr_t>(stride_bytes) % alignment == 0;
}

bool can_hold(const RmsNormArgs& args) {
  return args.row_elements % 4 == 0 && args.row_elements <= 4 * kHeld * int64_t{kThreads} &&
         is_aligned(args.x, 4 * args.ldx, 16) && is_aligned(args.weight, 0, 16) &&
         (args.y == nullptr || is_aligned(args.y, 4 * args.ldy, 16)) &&
         is_aligned(args.y16, 2 * args.row_elements, 8);
}

}  // namespace

void rms_norm_cuda(Exec& exec, const RmsNormArgs& args) {
  if (args.num_rows == 0 || args.row_elements == 0) return;
  launch(can_hold(args) ? rms_norm_held_kernel : rms_norm_kernel, blocks_for(args.num_rows, 1),
         kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
