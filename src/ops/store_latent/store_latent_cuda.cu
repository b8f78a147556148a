#include "ops/kit/warp_rows.cuh"
#include "ops/store_latent/store_latent.h"

namespace indexcache {

namespace {

struct Store {
  const float* x;
  int64_t ldx, num_rows;
  int latent_dim, half;  // half: pairs behind
  const float* weight;
  float eps;
  const float* cos;
  const float* sin;
  const SeqSpan* seqs;
  int num_seqs;
  PagedRows rows;
  int64_t row_bytes;
  bool vector;  // quadruples of the row, of the weight and of the cache are aligned
};

// One warp a row, which is read once: kBlocks times 128 elements hold its first part.
template <DType dtype, int kBlocks>
__global__ void __launch_bounds__(kRowWarps* kWarpLanes) store_latent_kernel(Store store) {
  wait_for_previous();
  const int64_t token = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpLanes;
  if (token >= store.num_rows) return;
  const int lane = threadIdx.x % kWarpLanes, n = store.latent_dim;
  const float* x = store.x + token * store.ldx;

  float held[kBlocks][4], weight[kBlocks][4];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int i = b * kWarpElements + 4 * lane;
    load_quad(x, i, n, store.vector, held[b]);
    load_quad(store.weight, i, n, store.vector, weight[b]);
  }
  const SeqSpan& seq = store.seqs[warp_find_seq(store.seqs, store.num_seqs, token)];
  uint8_t* row = paged_row(store.rows, store.row_bytes, seq.pages,
                           seq.first_position + token - seq.token_begin);

  float squares = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) squares += held[b][e] * held[b][e];
  }
  const float scale = 1 / sqrtf(warp_sum(squares) / static_cast<float>(n) + store.eps);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float y[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = held[b][e] * scale * weight[b][e];
    store_quad<dtype>(row, b * kWarpElements + 4 * lane, n, store.vector, y, 0);
  }

  for (int j = lane; j < store.half; j += kWarpLanes) {
    const float a = x[n + 2 * j], b = x[n + 2 * j + 1];
    const float c = store.cos[token * store.half + j], s = store.sin[token * store.half + j];
    const float first = a * c - b * s, second = a * s + b * c;
    if constexpr (dtype == DType::kF32) {
      float* to = reinterpret_cast<float*>(row) + n + 2 * j;
      to[0] = first;
      to[1] = second;
    } else {
      uint16_t* to = reinterpret_cast<uint16_t*>(row) + n + 2 * j;
      to[0] = static_cast<uint16_t>(f32_to_bf16_bits(first));
      to[1] = static_cast<uint16_t>(f32_to_bf16_bits(second));
    }
  }
}

}  // namespace

bool store_latent_cuda_supported(const StoreLatentArgs& args) {
  return args.latent_dim <= kMaxWarpRow;
}

void store_latent_cuda(Exec& exec, const StoreLatentArgs& args) {
  if (args.num_rows == 0) return;
  Store store = {};
  store.x = args.x;
  store.ldx = args.ldx;
  store.num_rows = args.num_rows;
  store.latent_dim = static_cast<int>(args.latent_dim);
  store.half = static_cast<int>(args.rows.row_elements - args.latent_dim) / 2;
  store.weight = args.weight;
  store.eps = args.eps;
  store.cos = args.cos;
  store.sin = args.sin;
  store.seqs = args.device_seqs;
  store.num_seqs = static_cast<int>(args.seqs.size());
  store.rows = args.rows;
  store.row_bytes = paged_row_bytes(args.rows.dtype, args.rows.row_elements);
  store.vector = args.latent_dim % 4 == 0 && is_aligned(args.x, 4 * args.ldx, 16) &&
                 is_aligned(args.weight, 0, 16) && is_aligned(args.rows.base, 0, 16) &&
                 args.rows.page_bytes % 16 == 0 && store.row_bytes % 16 == 0;
  const bool short_row = args.latent_dim <= 512, f32 = args.rows.dtype == DType::kF32;
  launch(
      f32 ? (short_row ? store_latent_kernel<DType::kF32, 4> : store_latent_kernel<DType::kF32, 8>)
          : (short_row ? store_latent_kernel<DType::kBF16, 4>
                       : store_latent_kernel<DType::kBF16, 8>),
      blocks_for(args.num_rows, kRowWarps), kRowWarps * kWarpLanes, 0, exec.cuda(), store);
}

}  // namespace indexcache
