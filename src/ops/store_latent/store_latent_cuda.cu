#include "ops/kit/warp_rows.cuh"
#include "ops/store_latent/store_latent.h"

namespace indexcache {

namespace {

static_assert(kWarpElements == kFp8Block);

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
  bool vector, vector_cache;  // quadruples of the row and the weight, of the
                              // cache are aligned
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
    float block_scale = 0;
    if constexpr (dtype == DType::kF8E4M3) {
      if (b * kWarpElements >= n) break;
      float largest = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) largest = with_magnitude(largest, y[e]);
      block_scale = scale_for(warp_max(largest), 448);
      if (lane == 0) reinterpret_cast<float*>(row + n)[b] = block_scale;
    }
    store_quad<dtype>(row, b * kWarpElements + 4 * lane, n, store.vector_cache, y, block_scale);
  }

  uint8_t* rest = row + (dtype == DType::kF8E4M3 ? n + n / kWarpElements * 4
                         : dtype == DType::kBF16 ? 2 * n
                                                 : 4 * n);
  for (int j = lane; j < store.half; j += kWarpLanes) {
    const float a = x[n + 2 * j], b = x[n + 2 * j + 1];
    const float c = store.cos[token * store.half + j], s = store.sin[token * store.half + j];
    const float first = a * c - b * s, second = a * s + b * c;
    if constexpr (dtype == DType::kF32) {
      float* to = reinterpret_cast<float*>(rest) + 2 * j;
      to[0] = first;
      to[1] = second;
    } else {
      uint16_t* to = reinterpret_cast<uint16_t*>(rest) + 2 * j;
      to[0] = static_cast<uint16_t>(f32_to_bf16_bits(first));
      to[1] = static_cast<uint16_t>(f32_to_bf16_bits(second));
    }
  }
}

template <int kBlocks>
auto kernel_for(DType dtype) {
  return dtype == DType::kF32    ? store_latent_kernel<DType::kF32, kBlocks>
         : dtype == DType::kBF16 ? store_latent_kernel<DType::kBF16, kBlocks>
                                 : store_latent_kernel<DType::kF8E4M3, kBlocks>;
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
  store.row_bytes = args.rows.row_bytes();
  store.vector = args.latent_dim % 4 == 0 && is_aligned(args.x, 4 * args.ldx, 16) &&
                 is_aligned(args.weight, 0, 16);
  // Four elements are 16, 8 or, in fp8, whose parts are multiples of 4 bytes, 4 bytes.
  const int64_t quad_bytes = 4 * dtype_bytes(args.rows.dtype);
  store.vector_cache = args.latent_dim % 4 == 0 && store.row_bytes % quad_bytes == 0 &&
                       is_aligned(args.rows.base, args.rows.page_bytes, quad_bytes);
  launch(args.latent_dim <= 512 ? kernel_for<4>(args.rows.dtype) : kernel_for<8>(args.rows.dtype),
         blocks_for(args.num_rows, kRowWarps), kRowWarps * kWarpLanes, 0, exec.cuda(), store);
}

}  // namespace indexcache
