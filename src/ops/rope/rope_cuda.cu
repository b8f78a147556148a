#include "ops/rope/rope.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 256;

// One thread a pair.
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeArgs args) {
  wait_for_previous();
  const int64_t half = args.rope_dim / 2;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= args.num_rows * args.num_heads * half) return;
  const int64_t j = pair % half, head = pair / half % args.num_heads,
                row = pair / half / args.num_heads;
  const int64_t at = row * args.ldx + head * args.x_head_stride;
  float* y = args.y + row * args.ldy + head * args.y_head_stride;
  const int64_t first = args.interleaved ? 2 * j : j;
  const int64_t second = args.interleaved ? 2 * j + 1 : j + half;
  const float a = args.x16 != nullptr ? bf16_bits_to_f32(args.x16[at + first]) : args.x[at + first];
  const float b =
      args.x16 != nullptr ? bf16_bits_to_f32(args.x16[at + second]) : args.x[at + second];
  const float c = args.cos[row * half + j], s = args.sin[row * half + j];
  y[first] = a * c - b * s;
  y[second] = a * s + b * c;
}

}  // namespace

void rope_cuda(Exec& exec, const RopeArgs& args) {
  const int64_t pairs = args.num_rows * args.num_heads * (args.rope_dim / 2);
  if (pairs == 0) return;
  launch(rope_kernel, blocks_for(pairs, kThreads), kThreads, 0, exec.cuda(), args);
}

}  // namespace indexcache
